# weft: `make run` shows it at work, `make test` checks all of it. Each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
PROMPT := examples/prompt.txt

.PHONY: run test test-all lint clean

run: .venv/ready
	$(BIN)/weft generate --tp 2 --threads 1 --max-tokens 96 --temperature 0 \
		--compare < $(PROMPT)

test: .venv/ready-dev system-packages lint
	$(BIN)/python -m pytest -q

test-all: .venv/ready-dev system-packages lint
	$(BIN)/python -m pytest -q -m "grid or not grid"

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "weft needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

# The tests of shaped links need iproute2, those of pages Chromium; without them they are skipped with the reason.
.PHONY: system-packages
system-packages:
	@missing=""; command -v tc >/dev/null || missing="iproute2"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null || true; fi

clean:
	rm -rf .venv *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
