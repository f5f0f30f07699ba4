"""Broken model files, read as a user would have them read.

    python -m benchmarks.fuzz.files                     two minutes
    python -m benchmarks.fuzz.files --seconds 600 --seed 7

Small GGUF models and quantised checkpoints of every kind are damaged at random: bytes, numbers, lengths, shapes, names,
whole pieces. Each is opened and read to the end by a process of its own. It may be refused, by one line; or read, and
then a GGUF model's numbers must be those of the format's own package. Anything else is wrong: another error, an end of
the process, more than SECONDS, more than MIB of memory. Exits with 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fuzz.seeds import SEEDS

SECONDS, MIB = 10.0, 100
ODD = (0, 1, 2, 3, 7, 8, 9, 31, 32, 255, 256, 65535, 1 << 20, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 3, 1 << 40, 1e308, float("nan"), "", "x", "int", [], [0], {}, [[1]])
DTYPES = ("F32", "F16", "BF16", "I8", "U8", "I32", "I64", "F8_E4M3", "BOOL")


class Damage:
    """Damages a copy of a model, in one of several ways, a few times over."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def __call__(self, path: Path) -> None:
        for _ in range(self.draw.choice((1, 1, 1, 2, 3, 8))):
            if path.is_dir():
                self._directory(path)
            else:
                path.write_bytes(self._bytes(bytearray(path.read_bytes())))

    def _bytes(self, data: bytearray) -> bytes:
        draw, head = self.draw, min(len(data), 8000)  # mostly where the headers are
        at = draw.randrange(head if draw.random() < 0.8 else len(data)) if data else 0
        kind = draw.randrange(7)
        if kind == 0:
            return bytes(data[:at])
        if kind == 1:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", draw.choice(ODD))
        elif kind == 3:
            data[at : at + 4] = struct.pack("<I", draw.choice(ODD) & 0xFFFFFFFF)
        elif kind == 4:
            del data[at : at + draw.randrange(1, 64)]
        elif kind == 5:
            data[at:at] = data[at : at + draw.randrange(1, 64)]
        else:
            return self._counted(data)
        return bytes(data)

    def _counted(self, data: bytearray) -> bytes:
        """Another number where one is: lengths, counts and offsets are small."""
        places = [
            at for at in range(0, min(len(data), 8000) - 8) if 0 < int.from_bytes(data[at : at + 8], "little") < 1 << 20
        ]
        if places:
            at = self.draw.choice(places)
            number = int.from_bytes(data[at : at + 8], "little") + self.draw.choice((-1, 1, 32, -32, 1000, 1 << 40))
            data[at : at + 8] = struct.pack("<Q", number % (1 << 64))
        return bytes(data)

    def _directory(self, path: Path) -> None:
        kind = self.draw.randrange(8)
        if kind == 0:
            file = self.draw.choice(sorted(path.iterdir()))
            file.write_bytes(self._bytes(bytearray(file.read_bytes())))
        elif kind == 1 and len(files := sorted(path.iterdir())) > 1:
            self.draw.choice(files).unlink()
        elif kind < 5:
            config = path / "config.json"
            if config.is_file():
                config.write_text(json.dumps(self._json(self._read(config))))
        else:
            self._tensors(path / "model.safetensors")

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text("utf-8", "replace"))
        except ValueError:
            return {}

    def _json(self, value: Any) -> Any:
        """With one value replaced, somewhere inside."""
        if isinstance(value, dict) and value and self.draw.random() < 0.9:
            key = self.draw.choice(list(value))
            inner = isinstance(value[key], dict | list) and self.draw.random() < 0.8
            return {**value, key: self._json(value[key])} if inner else self._without(value, key)
        if isinstance(value, list) and value and self.draw.random() < 0.8:
            at = self.draw.randrange(len(value))
            return [*value[:at], self._json(value[at]), *value[at + 1 :]]
        return self.draw.choice(VALUES)

    def _without(self, value: dict[str, Any], key: str) -> dict[str, Any]:
        if self.draw.random() < 0.3:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: self.draw.choice(VALUES)}

    def _tensors(self, path: Path) -> None:
        """A header that fits its file, and another one's tensors."""
        if not path.is_file() or path.stat().st_size < 8:
            return
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
            names = [name for name in header if name != "__metadata__"]
            name = self.draw.choice(names)
            self._changed(header, names, name)
        except (ValueError, LookupError, TypeError, AttributeError):
            return
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    def _changed(self, header: dict[str, Any], names: list[str], name: str) -> None:
        kind, entry = self.draw.randrange(5), header[name]
        if kind == 0:
            header[self.draw.choice(("x.", "")) + name + "_"] = header.pop(name)
        elif kind == 1:
            entry["shape"] = entry["shape"][::-1] if self.draw.random() < 0.5 else [*entry["shape"], 1]
        elif kind == 2:
            entry["dtype"] = self.draw.choice(DTYPES)
        elif kind == 3:
            other = self.draw.choice(names)
            header[name], header[other] = header[other], entry
        else:
            entry["shape"] = [1, *entry["shape"]] if self.draw.random() < 0.5 else [max(entry["shape"], default=1)]


class Child:
    """The process that reads. `plant`: a fault that it is to have, by its name in benchmarks.fuzz.planted."""

    def __init__(self, plant: str | None = None) -> None:
        command = [sys.executable, "-m", "benchmarks.fuzz.reading", *([plant] if plant else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def read(self, path: Path, seconds: float = SECONDS) -> dict[str, Any]:
        """What came of it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        if not self._selector.select(seconds):
            return {"wrong": f"takes longer than {seconds:g} s"}
        line = self._process.stdout.readline()
        if not line:
            return {"wrong": f"the process ended with {self._process.wait(10)}"}
        said: dict[str, Any] = json.loads(line)
        return said

    def close(self) -> None:
        self._selector.close()
        self._process.kill()
        self._process.communicate()


def fuzz(
    folder: Path, seconds: float, seed: int, plant: str | None = None, enough: int = 1000,
    told: Callable[[Counter[str]], None] = lambda counts: None,
) -> tuple[Counter[str], list[str]]:  # fmt: skip
    """How many files were read and refused, and what was wrong, until `enough` was."""
    whole = [make(folder) for make in SEEDS]
    draw, counts, wrong = random.Random(seed), Counter[str](), list[str]()
    child = Child(plant)
    try:
        for path in whole:  # before they are damaged; importing torch takes long
            said = child.read(path, 120)
            if "read" not in said:
                wrong.append(f"{path.name}, as it was: {said}")
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(wrong) < enough:
            case = draw.randrange(1 << 40)
            found = one(child, whole, folder, case)
            counts[next(iter(found))] += 1
            if "wrong" in found:
                wrong.append(f"case {case}: {found['wrong']}")
                child.close()
                child = Child(plant)
                child.read(whole[0], 120)
            told(counts)
    finally:
        child.close()
    return counts, wrong


def one(child: Child, whole: list[Path], folder: Path, case: int) -> dict[str, Any]:
    """One damaged file, by its number."""
    draw = random.Random(case)
    source = draw.choice(whole)
    target = folder / f"damaged-{source.name}"
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    Damage(draw)(target)
    said = child.read(target)
    if "wrong" in said:
        said["wrong"] = f"{source.name}: {said['wrong']}"
    return said


def main() -> int:
    """Fuzzes, prints what was read, refused and wrong, and says by its exit code whether all held."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fuzz.files", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as folder:
        counts, wrong = fuzz(Path(folder), given.seconds, given.seed)
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    for line in wrong[:20]:
        print(f"  wrong: {line}")
    print(f"  {len(wrong)} wrong" if wrong else "  all held")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
