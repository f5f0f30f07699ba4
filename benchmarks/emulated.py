"""A rank whose computation is a timed wait: more ranks than there are cores, with messages and sums that are real.

Started in place of the usual worker (`Emulated` is a launcher of such ranks), on a model that is as wide as it should
be on the wire and next to nothing to compute. A stage takes what a layer of 1024 takes on one core of an AMD EPYC
(Zen 5), by rows and by pairs of positions; in a section of several ranks its part. What is measured so is emulated, and
to be called so.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from weft.execute.executor import _Pass
from weft.execute.worker import main
from weft.launch.local import LocalLauncher
from weft.program.stages import COMPUTE, Kind

ROW = {"attention": 68e-6, "mlp": 109e-6, "head": 75e-6, "embed": 1e-6}  # seconds of a whole stage
STAGE = {"attention": 4e-4, "mlp": 8e-4, "head": 1.5e-3, "embed": 5e-5}  # that it takes for no rows at all
PAIR = 5e-8  # of attention, of two positions
KINDS = {Kind.COMPUTE: 1.0, Kind.BODY: 0.65, Kind.TAIL: 0.35}  # what of it a step has; entering takes next to nothing

_compute = _Pass._compute


class Emulated(LocalLauncher):
    """Starts ranks of this file."""

    command = (sys.executable, "-P", str(Path(__file__).resolve()))


def _waiting(self: _Pass, now: Any) -> None:
    """Computes, then waits until the stage would be over."""
    begin, before = time.perf_counter(), self.busy[COMPUTE]
    _compute(self, now)
    if self.busy[COMPUTE] == before:  # nobody wanted it
        return
    time.sleep(max(0.0, begin + _seconds(self, now) - time.perf_counter()))
    self.busy[COMPUTE] = before
    self._ended(now.number, COMPUTE, begin)


def _seconds(run: _Pass, now: Any) -> float:
    part, rows = run.outline.stages[now.place].part, now.extent.rows
    leaving = rows.length if part == "attention" else now.extent.leaves.length
    pairs = rows.length * (rows.start + rows.length / 2) if part == "attention" else 0.0
    whole = KINDS.get(now.step.kind, 0.0) * (STAGE[part] + ROW[part] * leaving + PAIR * pairs)
    return whole if part == "embed" else whole / (len(now.step.ranks) or run.group.world)


if __name__ == "__main__":
    _Pass._compute = _waiting  # type: ignore[method-assign]
    sys.exit(main())
