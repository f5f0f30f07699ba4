"""weft: LLM inference over slow links.

Tensor parallelism whose communication hides behind the computation of the same prompt.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.batching.params import SamplingParams
    from weft.errors import InputError
    from weft.llm import LLM, CompletionOutput, RequestOutput

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "InputError", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "weft.llm",
    "CompletionOutput": "weft.llm",
    "RequestOutput": "weft.llm",
    "SamplingParams": "weft.batching.params",
    "InputError": "weft.errors",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that rooms without torch stay quick to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
