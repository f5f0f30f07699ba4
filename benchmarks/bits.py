"""Whether `--reproducible` gives the bits that another checkout gives.

    python benchmarks/bits.py /path/to/the/other/checkout

Tiny random models of every family on one to three ranks: logits of prompts alone and together, and greedy tokens. Each
checkout runs its own code in its own .venv, on the same files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent
COMPUTE = """
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, ".")
from tests.ranks import Ranks
from tests.tiny import MODELS, Checkpoints, prompt_of
checkpoints, bits = Checkpoints(Path(sys.argv[1])), {}
for name in MODELS:
    for shares in ((1.0,), (1.0, 1.0), (2.0, 1.0, 1.0)):
        ranks = Ranks(checkpoints.directory(name), shares, True)
        for lengths in ((700,), (3, 200, 41), (1,)):
            logits = ranks.logits([prompt_of(length, seed) for seed, length in enumerate(lengths)], "serial")
            bits[f"{name} {shares} {lengths}"] = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        bits[f"{name} {shares} greedy"] = str(ranks.greedy([prompt_of(150)], "serial", 6)[1])
        ranks.close()
print(json.dumps(bits))
"""


def bits(checkout: Path, models: str) -> dict[str, str]:
    """Of every case, a hash of its logits, or the tokens."""
    command = [str(checkout / ".venv/bin/python"), "-c", COMPUTE, models]
    run = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=600, check=False)
    if run.returncode:
        raise SystemExit(f"{checkout}: {run.stderr[-2000:]}")
    answer: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as models:
        theirs, ours = bits(given.other, models), bits(HERE, models)
    different = [case for case in ours if ours[case] != theirs.get(case)]
    for case in different:
        print(f"differs: {case}")
    print(f"{len(ours)} comparisons, {len(different)} differ")


if __name__ == "__main__":
    main()
