"""The text that the packaged model is trained on: what comes with CPython itself.

Three kinds of document, all under the Python Software Foundation licence: the documentation topics that
`help()` shows (`pydoc_data.topics`), the docstrings of the standard library, and its sources. Knows files and
syntax trees; knows nothing of tokens or models.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "encodings", "site-packages", "pydoc_data", "lib2to3", "turtledemo"}
HELD_OUT_PERCENT = 2


@dataclass(frozen=True)
class Document:
    """One text with where it came from; `name` decides which side of the held-out split it falls on."""

    name: str
    kind: str  # "topic", "docstrings" or "source"
    text: str

    @property
    def held_out(self) -> bool:
        """True for about `HELD_OUT_PERCENT` of the documents, by a hash of the name, so that it never changes."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def documents() -> Iterator[Document]:
    """Every topic, every module's docstrings, and every module's source, in a fixed order."""
    for name, text in sorted(topics.items()):
        yield Document(f"topic:{name}", "topic", text.strip() + "\n")
    for path in sorted(library_files()):
        source = path.read_text("utf-8", errors="ignore")
        # Docstrings stand in the source too: one name for both keeps a module on one side of the split.
        yield Document(f"module:{path.name}", "docstrings", docstrings(source))
        yield Document(f"module:{path.name}", "source", source)


def library_files() -> Iterator[Path]:
    """The standard library's `.py` files, without tests, tables and bundled tools."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            yield path


def docstrings(source: str) -> str:
    """All docstrings of at least 60 characters in one module, dedented, one paragraph apart."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text and len(text) >= 60)
