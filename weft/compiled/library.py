"""The compiled kernels as one library: made at the first start, tried in a process of its own, kept by what made it.

Where there is no C compiler, or what it made fails its test, there is none: everything that it does torch does too.
Knows compilers and files; knows nothing of tensors or models. No torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec
from platformdirs import user_cache_path

from weft.config import processor_name
from weft.locks import locked

COMPILER_VARIABLE = "WEFT_COMPILER"  # a C compiler, instead of those below; "none": torch's kernels alone
COMPILERS = ("gcc", "cc", "clang")
SOURCES = Path(__file__).parent / "sources"
FILES = ("products.c", "between.c")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# GCC: the same thread pool as torch's, and sums that stay in registers. What a compiler doesn't know, it does without.
WISHES = (("-march=native",), ("-mcpu=native",), ()), (("-fopenmp", "-fno-tree-pre"), ())
LANES = 16  # numbers that are computed with at a time: heads' widths are multiples of it, weights have whole blocks
SECONDS = 120.0  # at most, of one try
TEST = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).weft_check())"

_POINTER, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
FUNCTIONS = {
    "weft_product": (_INT, [_POINTER, _INT, _POINTER, _COUNT, _COUNT, _POINTER, _INT]),
    "weft_floats": (None, [_POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _COUNT, _POINTER, _INT]),
    "weft_unit": (None, [_POINTER, _COUNT, _COUNT, _FLOAT, _POINTER, _INT]),
    "weft_gate": (None, [_POINTER, _COUNT, _COUNT, _INT, _POINTER, _INT]),
    "weft_rotate": (None, [_POINTER, *([_COUNT] * 5), _POINTER, _INT]),
    "weft_keep": (None, [*([_POINTER] * 3), _COUNT, _POINTER, _COUNT]),
    "weft_attend": (_INT, [*([_POINTER] * 3), _COUNT, _POINTER, _COUNT, _COUNT, _FLOAT, _POINTER, _POINTER, _INT]),
    "weft_form": (ctypes.c_char_p, []),
    "weft_shift": (_INT, []),
}


class Weight(ctypes.Structure):
    """As products.c has it."""

    _fields_ = (
        ("padded", _COUNT), ("outputs", _COUNT), ("blocks", _COUNT), ("codes", _POINTER), ("scales", _POINTER),
        ("starts", _POINTER), ("bias", _POINTER), ("gains", _POINTER),
    )  # fmt: skip


class KeysPlace(ctypes.Structure):
    """As between.c has it, where it is called Kept."""

    _fields_ = (
        ("keys", _POINTER), ("values", _POINTER), ("key_scales", _POINTER), ("value_scales", _POINTER),
        ("heads", _COUNT), ("width", _COUNT), ("head", _COUNT), ("scale", _COUNT),
    )  # fmt: skip


class _Failure(msgspec.Struct):
    """Why there is no library: with which compiler, when that was changed last, and its reason."""

    compiler: str
    modified: float
    reason: str


@cache
def library() -> ctypes.CDLL | None:
    """The functions, compiled now if they aren't yet; None where there can't be any."""
    compiler = compiler_here()
    if compiler is None:
        return None
    path = _path()
    with locked(path.with_suffix(".lock")):
        if not path.exists() and not _failed(path, compiler):
            _make(path, compiler)
    return _loaded(path)


def compiler_here() -> str | None:
    """Where the C compiler is."""
    asked = os.environ.get(COMPILER_VARIABLE, "")
    if asked == "none":
        return None
    return next(filter(None, map(shutil.which, [asked] if asked else COMPILERS)), None)


def why_none() -> str:
    """Why there is no library."""
    compiler, failure = compiler_here(), None
    if os.environ.get(COMPILER_VARIABLE) == "none":
        return f"{COMPILER_VARIABLE}=none"
    if compiler is None:
        return "no C compiler"
    with suppress(OSError, msgspec.MsgspecError):
        failure = msgspec.json.decode(_path().with_suffix(".json").read_bytes(), type=_Failure)
    return failure.reason if failure else "the user's cache can't be written"


def _path() -> Path:
    """By all that the library depends on, except a compiler's version: it was tried."""
    sources = [(SOURCES / name).read_text("utf-8") for name in sorted(os.listdir(SOURCES))]
    made_of = [*sources, repr((FLAGS, WISHES)), processor_name(), _instructions(), sys.platform]
    name = hashlib.sha256(msgspec.json.encode(made_of)).hexdigest()[:20]
    return user_cache_path("weft") / "compiled" / f"{name}.so"


def _instructions() -> str:
    """What the processor can do, as far as the system tells: a virtual one may be moved."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""


def _failed(path: Path, compiler: str) -> bool:
    """It was tried in vain, with this compiler as it is."""
    with suppress(OSError, msgspec.MsgspecError):
        failure = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=_Failure)
        return failure.compiler == compiler and failure.modified == Path(compiler).stat().st_mtime
    return False


def _make(path: Path, compiler: str) -> None:
    """Compiles with as many wishes as can be had, tries what came out, and keeps it, or why there is nothing."""
    reason = ""
    with suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        for processor in WISHES[0]:
            for more in WISHES[1]:
                files = [str(SOURCES / name) for name in FILES]
                error = _ran([compiler, *FLAGS, *processor, *more, "-o", str(fresh), *files, "-lm"])
                error = error or _ran([sys.executable, "-I", "-c", TEST, str(fresh)], "its test")
                if not error:
                    fresh.replace(path)
                    return
                reason = reason or f"{Path(compiler).name}: {error}"
        failure = _Failure(compiler, Path(compiler).stat().st_mtime, reason)
        path.with_suffix(".json").write_bytes(msgspec.json.encode(failure))


def _ran(command: list[str], what: str = "it") -> str:
    """Why it failed; empty if it didn't."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    said = [line.replace(str(SOURCES), "") for line in done.stderr.splitlines() if "error" in line.lower()]
    return said[0] if said else f"{what} ended with {done.returncode}"


def _loaded(path: Path) -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(path))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return found
