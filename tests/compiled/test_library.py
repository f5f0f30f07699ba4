"""The compiled library: made once, tried before it is used, and done without where there can't be one."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from weft.compiled import library as made
from weft.compiled.library import COMPILER_VARIABLE, FILES, FLAGS, SOURCES, library, why_none

GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="no gcc on this machine")
FORMS = {
    "AVX-512 VNNI": ["-march=icelake-server"], "AVX-VNNI": ["-march=haswell", "-mavxvnni"], "AVX2": ["-march=haswell"],
    "plain C": ["-march=x86-64-v2"],
}  # fmt: skip
STRICT = [
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-but-set-parameter",
    "-Wno-unused-parameter",
]
NEEDED = {"AVX-512 VNNI": "avx512_vnni", "AVX-VNNI": "avx_vnni", "AVX2": "avx2", "plain C": "sse4_2"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's cache of its own, in which nothing is."""
    monkeypatch.setattr(made, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.delenv(COMPILER_VARIABLE, raising=False)
    library.cache_clear()
    yield
    library.cache_clear()


def compiler(path: Path, text: str) -> str:
    """A program that is asked to compile."""
    path.write_text(f"#!/bin/sh\necho called >> {path}.calls\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def calls(path: Path) -> int:
    return len(Path(f"{path}.calls").read_text().splitlines())


@needs_gcc
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cc = tmp_path / "cc"
    monkeypatch.setenv(COMPILER_VARIABLE, compiler(cc, f'exec {GCC} "$@"'))
    before = os.umask(0)  # as in containers
    first = library()
    os.umask(before)
    assert first is not None and first.weft_form().decode() in FORMS and first.weft_check() == 0
    once, folder = calls(cc), tmp_path / "weft" / "compiled"
    library.cache_clear()
    assert library() is not None and calls(cc) == once
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"], "nothing else is left there"
    kept = next(folder.glob("*.so"))
    assert kept.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(COMPILER_VARIABLE, "/nowhere/cc")  # what is there needs no compiler
    library.cache_clear()
    assert library() is not None


@needs_gcc
def test_a_damaged_library_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made._path()
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(b"\x7fELF and no more")
    path.chmod(0o700)
    assert library() is not None and path.stat().st_size > 10_000


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_may_write_is_not_loaded(tmp_path: Path, what: str) -> None:
    path = made._path()
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(b"anything")
    (path.parent if what == "folder" else path).chmod(0o777)
    if what == "folder":
        assert library() is None and "others may write" in why_none()
    else:
        assert library() is None or path.stat().st_mode & 0o077 == 0, "made again"


BROKEN = {
    "says why": ("echo 'x.c:1: error: no such thing' >&2; exit 1", "error: no such thing"),
    "speaks its own tongue": ("printf '\\377: error: \\344\\n' >&2; exit 1", "error"),
    "says nothing": ("exit 3", "ended with 3"),
    "isn't one": ("exit 0", "cannot open shared object"),  # there is nothing to be tried
}
WRONG = {"wrong sums": ("return 3;", "ended with 3"), "an instruction too many": ("__builtin_trap();", "ended with -")}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_compiler_that_fails_is_asked_once_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    text, reason = BROKEN[kind]
    cc = tmp_path / "cc"
    monkeypatch.setenv(COMPILER_VARIABLE, compiler(cc, text))
    assert library() is None and reason in why_none()
    tried = calls(cc)

    def another_compiler() -> None:
        os.utime(cc, (2e9, 2e9))

    def an_hour_later() -> None:
        monkeypatch.setattr(made, "AGAIN", 0.0)

    for change, again in ((None, False), (another_compiler, True), (an_hour_later, True)):
        if change is not None:
            change()
        library.cache_clear()
        assert library() is None and (calls(cc) > tried) is again, change
        tried = calls(cc)


def test_a_compiler_that_hangs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that it has started."""
    monkeypatch.setattr(made, "SECONDS", 1.0)
    monkeypatch.setenv(COMPILER_VARIABLE, compiler(tmp_path / "cc", f"sleep 600 & echo $! > {tmp_path}/child; wait"))
    assert library() is None and "took more than 1 s" in why_none()
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


@needs_gcc
@pytest.mark.parametrize("kind", WRONG)
def test_what_fails_its_test_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """An illegal instruction ends the process that tries it, and no other."""
    text, reason = WRONG[kind]
    (tmp_path / "x.c").write_text(f"int weft_check(void) {{ {text} }}")
    build = 'while [ "$1" != -o ]; do shift; done; exec ' + f'{GCC} -shared -fPIC -o "$2" {tmp_path}/x.c'
    monkeypatch.setenv(COMPILER_VARIABLE, compiler(tmp_path / "cc", build))
    assert library() is None and reason in why_none()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPILER_VARIABLE, "none")
    assert library() is None and why_none() == f"{COMPILER_VARIABLE}=none"
    library.cache_clear()
    monkeypatch.setenv(COMPILER_VARIABLE, "/nowhere/cc")
    assert library() is None and why_none() == "no C compiler"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weft").write_text("no folder")
    assert library() is None and (GCC is None or "can't be written" in why_none()), why_none()


@needs_gcc
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_sums_is_right(tmp_path: Path, form: str) -> None:
    """Those that this processor can run: each is another machine's."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or f" {NEEDED[form]} " not in cpuinfo.read_text().replace("\n", " "):
        pytest.skip(f"this processor hasn't {NEEDED[form]}")
    path = tmp_path / "form.so"
    threads = [] if form == "plain C" else ["-fopenmp", "-fno-tree-pre"]
    subprocess.run([GCC, *FLAGS, *FORMS[form], *threads, *STRICT, "-o", path, SOURCES / FILES[0], "-lm"], check=True)
    code = "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); lib.weft_form.restype = ctypes.c_char_p\n"
    code += "print(lib.weft_check(), lib.weft_form().decode())"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split(",")[0].strip() == f"0 {form}"


def test_places_are_numbers() -> None:
    sizes = {made.Weight: 9 * 8, made.KeysPlace: 8 * 8, made.WholeMlp: 4 * 8, made.WholeAttention: 11 * 8}
    assert {each: ctypes.sizeof(each) for each in sizes} == sizes
