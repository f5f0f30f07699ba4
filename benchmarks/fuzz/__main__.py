"""Random well-formed and malformed requests against the server, with faults in it.

    python -m benchmarks.fuzz                                       three models, half a minute each
    python -m benchmarks.fuzz --kind byte-fallback --seconds 600 --cases 400 --seed 7

Prompts, sampling values, stops, grammars, scores, streams and cancellations are drawn at random; a tenth of the
requests bring a fault: in detokenizer, stop text, grammar or sampler, or a rank that raises, crashes or is killed.
Every request must get its answer, or an error of its own; every other one exactly what it gets alone; the server stays
ready; slots and memory are in order at the end. Exits with 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.fuzz import faults
from benchmarks.fuzz.models import KINDS
from benchmarks.fuzz.run import Fuzz


def main() -> int:
    """Fuzzes, prints what was asked and what was wrong, and says by its exit code whether all held."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="of tokenizer; default: all, in turn")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each kind")
    parser.add_argument("--cases", type=int, default=150, help="distinct requests of each")
    parser.add_argument("--ranks-lost", choices=sorted(faults.RANK), action="append", help="default: each kind once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    lost = tuple(given.ranks_lost or sorted(faults.RANK))
    results = []
    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as folder:
        for kind in given.kind or KINDS:
            found = Fuzz(kind, Path(folder), given.seed, given.cases, lost).run(given.seconds)
            results.append(asdict(found))
            asked = ", ".join(f"{count} {name}" for name, count in sorted(found.asked.items()))
            print(f"{kind}: {asked}; {found.restarts} restarts; {found.reused:.0%} of prompts reused")
            for line in found.wrong[:20]:
                print(f"  wrong: {line}")
            print(f"  {len(found.wrong)} wrong" if found.wrong else "  all held", flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))
    return 1 if any(result["wrong"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
