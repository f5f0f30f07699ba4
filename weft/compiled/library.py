"""The compiled kernels as one library: made at the first start, tried in a process of its own, kept by what made it.

Where there is no C compiler, or what it made fails its test, there is none: everything that it does torch does too.
Knows compilers and files; knows nothing of tensors or models. No torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from platformdirs import user_cache_path

from weft.config import processor_name
from weft.locks import locked

COMPILER_VARIABLE = "WEFT_COMPILER"  # a C compiler, instead of those below; "none": torch's kernels alone
COMPILERS = ("gcc", "cc", "clang")
SOURCES = Path(__file__).parent / "sources"
FILES = ("check.c", "stages.c", "products.c", "between.c", "wires.c", "vectors.h")  # the first one includes the others
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# Each where the compiler takes it: this processor's instructions; sums that stay in registers; torch's pool of threads.
PROCESSOR = ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ("-march=native", "-mcpu=native")
WISHES = (PROCESSOR, ("-fno-tree-pre",), ("-fopenmp",))
LANES = 16  # numbers that are computed with at a time: heads' widths are multiples of it, weights have whole blocks
SECONDS = 60.0  # at most, until there is a library
AGAIN = 3600.0  # seconds after which what failed is tried again: memory or room may have been short
TEST = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).weft_check())"

_POINTER, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
FUNCTIONS = {
    "weft_product": (_INT, [_POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _INT]),
    "weft_plain": (None, [_POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _COUNT, _POINTER, _INT]),
    "weft_unit": (None, [_POINTER, _COUNT, _COUNT, _FLOAT, _POINTER, _INT]),
    "weft_gate": (None, [_POINTER, _COUNT, _COUNT, _INT, _POINTER, _INT]),
    "weft_rotate": (None, [_POINTER, *([_COUNT] * 5), _POINTER, _INT]),
    "weft_keep": (None, [*([_POINTER] * 3), _COUNT, _POINTER, _COUNT]),
    "weft_attend": (_INT, [*([_POINTER] * 3), _COUNT, _POINTER, _COUNT, _COUNT, _FLOAT, _POINTER, _POINTER, _INT]),
    "weft_mlp": (_INT, [_POINTER, _POINTER, _COUNT, _POINTER, _INT]),
    "weft_attention": (_INT, [*([_POINTER] * 6), _COUNT, *([_POINTER] * 3), _INT]),
    "weft_encode": (_INT, [_POINTER, _COUNT, _COUNT, _INT, _POINTER]),
    "weft_decode": (_INT, [_POINTER, _COUNT, _COUNT, _INT, _POINTER, _POINTER]),
    "weft_form": (ctypes.c_char_p, []),
    "weft_shift": (_INT, []),
}


class Weight(ctypes.Structure):
    """As products.c has it."""

    _fields_ = (
        ("bits", _COUNT), ("padded", _COUNT), ("outputs", _COUNT), ("blocks", _COUNT), ("codes", _POINTER),
        ("scales", _POINTER), ("starts", _POINTER), ("bias", _POINTER), ("gains", _POINTER),
    )  # fmt: skip


class WholeMlp(ctypes.Structure):
    """As stages.c has it, where it is called Mlp."""

    _fields_ = (
        ("first", _POINTER), ("last", _POINTER), ("hidden", _COUNT), ("epsilon", _FLOAT), ("cubic", ctypes.c_int32),
    )  # fmt: skip


class WholeAttention(ctypes.Structure):
    """As stages.c has it, where it is called Attention."""

    _fields_ = (
        ("first", _POINTER), ("last", _POINTER), ("hidden", _COUNT), ("epsilon", _FLOAT), ("cap", _FLOAT),
        ("heads", _COUNT), ("groups", _COUNT), ("width", _COUNT), ("rotary", _COUNT), ("scales", _POINTER),
        ("sinks", _POINTER), ("head_epsilon", _FLOAT),
    )  # fmt: skip


class KeysPlace(ctypes.Structure):
    """As between.c has it, where it is called Kept."""

    _fields_ = (
        ("keys", _POINTER), ("values", _POINTER), ("key_scales", _POINTER), ("value_scales", _POINTER),
        ("heads", _COUNT), ("width", _COUNT), ("head", _COUNT), ("scale", _COUNT),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The functions, compiled now if they aren't yet; None where there can't be any."""
    return _found()[0]


def why_none() -> str:
    """Why there is no library."""
    return _found()[1]


def compiler_here() -> str | None:
    """Where the C compiler is."""
    asked = os.environ.get(COMPILER_VARIABLE, "")
    return next(filter(None, map(shutil.which, [asked] if asked else COMPILERS)), None)


def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    if os.environ.get(COMPILER_VARIABLE) == "none":
        return None, f"{COMPILER_VARIABLE}=none"
    path = _path()
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        loaded, why = _loaded(path)
        if loaded is not None:
            return loaded, ""
        compiler, failure = compiler_here(), path.with_suffix(".txt")
        if compiler is None:
            return None, "no C compiler"
        with suppress(OSError, UnicodeDecodeError):
            if abs(time.time() - failure.stat().st_mtime) < AGAIN and _private(failure):
                tried, _, reason = failure.read_text("utf-8").partition("\n")
                if tried == _named(compiler):
                    return None, reason
        why = _make(path, compiler)
        if why:
            with suppress(OSError):
                failure.write_text(f"{_named(compiler)}\n{why}", "utf-8")
            return None, why
        return _loaded(path)


def _named(compiler: str) -> str:
    """A compiler as it is now."""
    return f"{compiler} {Path(compiler).stat().st_mtime_ns}"


def _path() -> Path:
    """By all that the library depends on, except a compiler's version: it was tried."""
    sources = [(SOURCES / name).read_text("utf-8") for name in FILES]
    where = sys.platform, platform.machine(), *platform.libc_ver(), processor_name(), _instructions()
    name = hashlib.sha256("\0".join([*sources, repr((FLAGS, WISHES, where))]).encode()).hexdigest()[:20]
    return user_cache_path("weft") / "compiled" / f"{name}.so"


def _instructions() -> str:
    """What the processor can do, as far as the system tells: a virtual one may be moved."""
    with suppress(OSError, UnicodeDecodeError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "CPU part"))}))
    return ""


def _private(path: Path) -> bool:
    """Whether nobody else can have written it."""
    told = path.lstat()
    own = not hasattr(os, "geteuid") or told.st_uid == os.geteuid()
    return own and not stat.S_ISLNK(told.st_mode) and not told.st_mode & 0o022


def _loaded(path: Path) -> tuple[ctypes.CDLL | None, str]:
    try:
        if not (_private(path.parent) and _private(path)):
            return None, f"others may write {path.parent}; delete it"
        found = ctypes.CDLL(str(path))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, str(error)
    return found, ""


def _make(path: Path, compiler: str) -> str:
    """Compiles with all wishes that can be had, tries what came out, and keeps it; why not, where that fails."""
    until = time.monotonic() + SECONDS
    try:
        if not _private(path.parent):
            return f"others may write {path.parent}; delete it"
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh, empty, flags = Path(folder) / path.name, Path(folder) / "empty.c", list(FLAGS)
            empty.write_text("int weft_empty;\n")
            for wish in WISHES:
                taken = (
                    flag for flag in wish if not _ran([compiler, *flags, flag, "-o", f"{fresh}0", str(empty)], until)
                )
                flags += filter(None, [next(taken, "")])
            why = _ran([compiler, *flags, "-o", str(fresh), str(SOURCES / FILES[0]), "-lm"], until)
            why = why or _ran([sys.executable, "-I", "-c", TEST, str(fresh)], until, "its test")
            if why:
                return f"{Path(compiler).name}: {why}"
            fresh.chmod(0o700)
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            fresh.replace(path)
    except OSError as error:
        return f"the user's cache can't be written ({error.strerror or error})"
    return ""


def _ran(command: list[str], until: float, what: str = "it") -> str:
    """Why it failed; empty if it didn't. What it has started ends with it."""
    environment = os.environ | {"LC_ALL": "C"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True, errors="replace") as process:  # type: ignore[call-overload]
        try:
            _, told = process.communicate(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"{what} took more than {SECONDS:.0f} s"
        finally:
            if hasattr(os, "killpg"):
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    if process.returncode == 0:
        return ""
    said = [line.replace(f"{SOURCES}{os.sep}", "") for line in told.splitlines() if "error" in line.lower()]
    return said[0] if said else f"{what} ended with {process.returncode}"
