"""Promises about the rooms themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TORCH_FREE = (
    "weft", "weft.errors", "weft.config", "weft.program.check", "weft.program.build", "weft.timeline.terminal",
    "weft.timeline.files", "weft.simulate.run", "weft.simulate.hardware", "weft.plan.planner", "weft.plan.calibrate",
    "weft.plan.kept", "weft.plan.budget", "weft.outlook.figures", "weft.batching.batcher", "weft.batching.params",
    "weft.cache.prefixes", "weft.execute.protocol", "weft.execute.controller", "weft.launch.namespaces",
    "weft.launch.joined", "weft.parallel.mesh", "weft.parallel.ring", "weft.model.families", "weft.model.shares",
    "weft.model.description", "weft.formats.fingerprint", "weft.cli.main",
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
    assert importers("torch.distributed") == {"weft/parallel/gloo.py"}


def test_who_owns_threads() -> None:
    """On a rank the lanes, its process and its mesh; in the engine's process the service and its server."""
    assert importers("threading") | importers("concurrent") == {
        "weft/execute/lanes.py", "weft/execute/process.py", "weft/parallel/mesh.py", "weft/server/service.py",
        "weft/server/run.py",
        "weft/parallel/ring.py",  # a lock, whose compare-and-swap is a fence
        "weft/server/child.py",  # sees the end of its standard input, whatever it is at
        "weft/text.py",  # a tokenizer is read while workers start
        "weft/server/metrics.py",  # a lock: the threads of several engines count
        "weft/grammar.py",  # a lock: who asks for a schema that is compiled just now waits for it
        "weft/launch/hub.py",  # a lock: groups on several threads share it; an event, by which a start is interrupted
        "weft/launch/sockets.py",  # takes what ZeroMQ tells of strangers, which would hold it up else
        "weft/launch/machine.py",  # looks at a model's files, which may take long, and gives signs of life meanwhile
    }  # fmt: skip


def test_nothing_reads_pickle() -> None:
    assert importers("pickle") == set()


def test_the_engine_and_the_attention_agree_on_the_granule() -> None:
    from weft import calibration
    from weft.model import attention

    assert calibration.GRANULE == attention.GRANULE


def package() -> Iterator[tuple[Path, ast.Module]]:
    for path in Path("weft").rglob("*.py"):
        yield path, ast.parse(path.read_text())


def test_one_word_one_class() -> None:
    names = [
        node.name.lstrip("_") for _, tree in package() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    assert not {name for name in names if names.count(name) > 1}


def test_what_is_read_stays_short() -> None:
    """Functions on a screen, files in one sitting, the engine as its own summary."""
    lengths = []
    for path, tree in package():
        lines = len(path.read_text().splitlines())
        assert lines <= (250 if path == Path("weft/engine.py") else 400), f"{path}: {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lengths.append(node.end_lineno - node.lineno + 1)
                assert lengths[-1] <= 60, f"{path}: {node.name} has {lengths[-1]} lines"
    lengths.sort()
    assert lengths[len(lengths) // 2] <= 6 and lengths[len(lengths) * 9 // 10] <= 15


def test_only_the_model_names_its_parts() -> None:
    """Other rooms take stages and matrices from the blueprint."""
    for path, tree in package():
        words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert path.parts[1] == "model" or not {"attention", "mlp"} & {w for w in words if isinstance(w, str)}, path


def test_only_the_model_names_families() -> None:
    """And GGUF's own words for what cuts a text before pairs are merged, which are no families."""
    from weft.model.families import FAMILIES, WRAPPED
    from weft.model.gguf import ARCHITECTURES

    names = {*FAMILIES, *WRAPPED, *(family.architecture for family in FAMILIES.values())}
    names |= {row.name for row in ARCHITECTURES}
    named = {
        str(path)
        for path, tree in package()
        if "model" not in path.parts
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert named == {"weft/formats/gguf/vocabulary.py"}
