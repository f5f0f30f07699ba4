"""What commands show while a model is loaded. Knows terminals; knows nothing of models."""

from __future__ import annotations

from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from weft.config import available_cores
from weft.llm import LLM


def bar(console: Console) -> Progress:
    """A line with what goes on, how far it is, and for how long; gone at the end."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def warn_of_shared_cores(console: Console, ranks: int | Literal["auto"]) -> None:
    """Where ranks on this machine outnumber its cores."""
    if ranks != "auto" and ranks > available_cores():
        console.print(f"[yellow]warning:[/] {ranks} ranks share {available_cores()} cores, so they will be slow")


def loaded(console: Console, model: str | None, **options: Any) -> LLM:
    """The model, loaded under a progress bar."""
    ranks = options["tensor_parallel_size"]
    ranks = ranks if ranks == "auto" else ranks * options.get("pipeline_parallel_size", 1)
    warn_of_shared_cores(console, ranks)
    with bar(console) as progress:
        task = progress.add_task(f"starting {ranks} rank{'' if ranks == 1 else 's'}", total=1.0)
        return LLM(
            model, **options, progress=lambda what, done: progress.update(task, completed=done, description=what)
        )
