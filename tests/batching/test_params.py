"""Sampling parameters."""

from __future__ import annotations

from typing import Any

import pytest

from weft.batching.params import SamplingParams
from weft.errors import InputError


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -2},
        {"min_p": 2}, {"presence_penalty": 3}, {"repetition_penalty": 0}, {"max_tokens": 0}, {"logprobs": 101},
        {"min_tokens": -1}, {"stop": ""}, {"stop": ["a", ""]}, {"temperature": "hot"}, {"n": True},
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SamplingParams(**wrong)


def test_says_what_is_allowed() -> None:
    with pytest.raises(InputError, match=r"top_p 1.5 is not allowed; give a number from 0 to 1"):
        SamplingParams(top_p=1.5)


def test_views() -> None:
    assert SamplingParams(temperature=0).greedy and not SamplingParams().greedy
    assert SamplingParams(stop="end").stops == ("end",) and SamplingParams(stop=["a", "b"]).stops == ("a", "b")
    assert SamplingParams(repetition_penalty=1.1).penalised and not SamplingParams().penalised
