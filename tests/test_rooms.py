"""Promises about the rooms themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

TORCH_FREE = (
    "weft", "weft.errors", "weft.config", "weft.program.check", "weft.program.build", "weft.timeline.terminal",
    "weft.timeline.files", "weft.simulate.run", "weft.simulate.hardware", "weft.plan.planner", "weft.plan.calibrate",
    "weft.plan.kept", "weft.plan.budget", "weft.outlook.figures", "weft.batching.batcher", "weft.batching.params",
    "weft.cache.prefixes", "weft.execute.protocol", "weft.execute.controller", "weft.launch.namespaces",
    "weft.launch.joined", "weft.parallel.pulse", "weft.model.families", "weft.model.shares",
)  # fmt: skip


def test_rooms_without_torch_do_not_import_it() -> None:
    code = f"import sys, {', '.join(TORCH_FREE)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def importers(module: str) -> set[str]:
    """Files of the package that import a module or something below it."""
    found = set()
    for path in Path("weft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name == module or name.startswith(module + ".") for name in names):
                found.add(str(path))
    return found


def test_only_parallel_uses_torch_distributed() -> None:
    assert importers("torch.distributed") == {"weft/parallel/group.py"}


def test_who_owns_threads() -> None:
    """On a rank the lanes, its process and its pulse; in the engine's process the service and its server."""
    assert importers("threading") | importers("concurrent") == {
        "weft/execute/lanes.py", "weft/execute/process.py", "weft/parallel/pulse.py", "weft/server/service.py",
        "weft/server/run.py",
        "weft/server/child.py",  # sees the end of its standard input, whatever it is at
        "weft/text.py",  # a tokenizer is read while workers start
        "weft/grammar.py",  # a lock: who asks for a schema that is compiled just now waits for it
        "weft/launch/joined.py",  # an event, by which a start that waits is interrupted
    }  # fmt: skip


def test_nothing_reads_pickle() -> None:
    assert importers("pickle") == set()


def test_the_engine_and_the_attention_agree_on_the_granule() -> None:
    from weft import calibration
    from weft.model import attention

    assert calibration.GRANULE == attention.GRANULE
