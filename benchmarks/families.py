"""The table of docs/families.md, made from the rows: `python -m benchmarks.families --write`. Without it, says whether
it is so.

Knows the rows, how many lines they are, and a tiny configuration of each family.
"""

from __future__ import annotations

import argparse
import ast
import logging
import sys
from collections import Counter
from functools import cache
from math import ceil
from pathlib import Path

from weft.config import ModelConfig
from weft.model import families, gguf
from weft.model.blueprint import Blueprint
from weft.model.configuration import configured
from weft.model.families import FAMILIES, blueprint_of
from weft.model.gguf import ARCHITECTURES

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- made from the rows by benchmarks/families.py -->", "<!-- to here -->"


def smallest(name: str) -> ModelConfig:
    """A configuration of the family with what transformers takes for granted, of few layers."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 12,
             "intermediate_size": 128, "vocab_size": 256}  # fmt: skip
    return configured({"model_type": name, **sizes})


def page() -> str:
    """The page with the table that the rows give."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    names = ("family", "`model_type`", "GGUF", "sums of a layer", "sliding window", "notes", "lines")
    head = f"| {' | '.join(names)} |", "|---" * len(names) + "|"
    return "\n".join([f"{before}{BEGIN}\n", *head, *(_row(name) for name in FAMILIES), f"\n{END}{after}"])


def _row(name: str) -> str:
    family, blueprint = FAMILIES[name], blueprint_of(smallest(name))
    types = ", ".join(f"`{each}`" for each in (name, *family.wrapped))
    stored = ", ".join(f"`{row.name}`" for row in ARCHITECTURES if row.family == name) or "none known"
    cells = (family.architecture.removesuffix("ForCausalLM"), types, stored, _stages(blueprint), _windows(blueprint),
             family.notes, str(lines_of(name)))  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _stages(blueprint: Blueprint) -> str:
    stages = blueprint.outline.layer
    return ", ".join(f"{s.part} ({s.aside} numbers a row)" if s.aside else s.part for s in stages)


def _windows(blueprint: Blueprint) -> str:
    part = sum(window is not None for window in blueprint.windows) / len(blueprint.windows)
    return "all layers" if part == 1 else f"{part:.0%} of layers" if part else "none"


def lines_of(name: str) -> int:
    """Of the rows of a family and all that they refer to in their files; of what several use, each has its part."""
    tables = ((Path(families.__file__), "FAMILIES"), (Path(gguf.__file__), "ARCHITECTURES"))
    return ceil(sum(_lines(path, table)[name] for path, table in tables))


@cache
def _lines(path: Path, table: str) -> dict[str, float]:
    """Of each family in one file."""
    tree = ast.parse(path.read_text("utf-8")).body
    assigned = {target.id: node for node in tree for target in _targets(node)}
    defined: dict[str, ast.stmt] = {node.name: node for node in tree if isinstance(node, ast.FunctionDef)} | assigned
    rows = _rows(defined.pop(table))
    used = {name: _used([*own], defined) for name, own in rows.items()}
    users = Counter(part for parts in used.values() for part in parts)
    return {
        name: sum(map(_length, rows.get(name, [])))
        + sum(_length(defined[part]) / users[part] for part in used.get(name, ()))
        for name in FAMILIES
    }  # fmt: skip


def _targets(node: ast.stmt) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target for target in targets if isinstance(target, ast.Name)]


def _rows(table: ast.stmt) -> dict[str, list[ast.expr]]:
    """By family; there may be several."""
    value, found = getattr(table, "value", None), dict[str, list[ast.expr]]()
    if isinstance(value, ast.Dict):
        return {str(getattr(k, "value", "")): [v] for k, v in zip(value.keys, value.values, strict=True)}
    for row in value.elts if isinstance(value, ast.Tuple) else ():
        assert isinstance(row, ast.Call)
        found.setdefault(str(getattr(row.args[1], "value", "")), []).append(row)
    return found


def _used(nodes: list[ast.expr], defined: dict[str, ast.stmt]) -> set[str]:
    """Names that these refer to, and that those refer to."""
    found, todo = set[str](), list[ast.AST](nodes)
    while todo:
        inside = {each.id for each in ast.walk(todo.pop()) if isinstance(each, ast.Name)}
        more = {name for name in inside if name in defined} - found
        found |= more
        todo += [defined[name] for name in more]
    return found


def _length(node: ast.AST) -> int:
    return int(getattr(node, "end_lineno", 0)) - int(getattr(node, "lineno", 1)) + 1


def main() -> int:
    """Writes it, or compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/families.md")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # small sizes lack the usual end tokens
    if parser.parse_args().write:
        PAGE.write_text(page(), "utf-8")
        return 0
    same = PAGE.is_file() and PAGE.read_text("utf-8") == page()
    print("docs/families.md is as the rows have it" if same else "docs/families.md is old: run it with --write")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
