# weft: `make run` shows it at work, `make test` checks all of it. Each sets up what it needs, at the locked versions.
PYTHON ?= python3
BIN := .venv/bin
NEWEST := .venv-newest/bin
PIP := bin/pip install -q --disable-pip-version-check
TORCH := torch==2.13.0
PROMPT := examples/prompt.txt

.PHONY: run test test-all test-newest lint lock clean

run: .venv/ready
	$(BIN)/weft generate --tp 2 --threads 1 --link 1x --max-tokens 96 --temperature 0 \
		--compare < $(PROMPT)

test: .venv/ready-dev system-packages lint
	$(BIN)/python -m tests.both

test-all: .venv/ready-dev system-packages lint
	$(BIN)/python -m tests.both --all

# The suite against the newest of everything that pyproject.toml allows, and what of it is not what is locked. torch
# stays where it is, because a plain `torch` may be gigabytes; `make test-newest TORCH=torch` takes that too, and
# TESTS=tests/server runs a part.
test-newest: python-version system-packages
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/$(PIP) $(TORCH)
	.venv-newest/$(PIP) -e '.[dev]'
	$(NEWEST)/python -m pytest -q -o filterwarnings=default $(TESTS); passed=$$?; \
		$(NEWEST)/python -m tests.versions locks/dev.txt; exit $$passed

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Exact versions of everything, for every Python from 3.11 on and every system: the newest that fit together.
lock: python-version
	$(PYTHON) -m venv .venv-lock
	.venv-lock/$(PIP) "$$(sed -n 's/^  "\(uv>=[^"]*\)".*/\1/p' pyproject.toml)"
	echo "$(TORCH)" > .venv-lock/torch.txt
	for extra in dev run; do \
		.venv-lock/bin/uv pip compile -q --universal --upgrade --python-version 3.11 --no-annotate \
			--custom-compile-command "make lock" --constraint .venv-lock/torch.txt \
			$$([ $$extra = dev ] && echo "--extra dev" || echo "--constraint locks/dev.txt") \
			pyproject.toml -o locks/$$extra.txt || exit 1; done

.PHONY: python-version
python-version:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "weft needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.12"; exit 2; }

.venv/ready: locks/run.txt pyproject.toml | python-version
	$(PYTHON) -m venv .venv
	.venv/$(PIP) -r locks/run.txt
	.venv/$(PIP) --no-deps -e .
	@touch $@

.venv/ready-dev: .venv/ready locks/dev.txt
	.venv/$(PIP) -r locks/dev.txt
	@touch $@

# The tests of shaped links need iproute2, those of pages Chromium; without them they are skipped with the reason.
.PHONY: system-packages
system-packages:
	@missing=""; command -v tc >/dev/null || missing="iproute2"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null || true; fi

clean:
	rm -rf .venv .venv-newest .venv-lock *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
