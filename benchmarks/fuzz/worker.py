"""A worker with faults in it, and, if the environment says so, with one that a test of the fuzz has planted."""

from __future__ import annotations

import importlib
import os
import sys

from benchmarks.fuzz import faults
from weft.execute.worker import main

PLANT = "WEFT_FUZZ_PLANT"  # module:function, called in every worker

if __name__ == "__main__":
    faults.in_worker()
    if planted := os.environ.get(PLANT):
        module, _, name = planted.partition(":")
        getattr(importlib.import_module(module), name)()
    sys.exit(main())
