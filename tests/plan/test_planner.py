"""Plans."""

from __future__ import annotations

import pytest

from tests.outlines import decoder_outline
from weft.errors import InputError
from weft.plan.planner import Planner
from weft.program.batch import Batch, Segment, one_prompt


def test_describes_itself() -> None:
    stages = decoder_outline(1)
    assert Planner(stages, "iso:2/4", "bf16").plan(one_prompt(8)).describe() == (
        "iso:2/4 · attention 0:4 4:8 · mlp 0:2 2:4 4:6 6:8 · 15 steps · wire bf16"
    )
    assert "attention 0:8 in 4 tiles" in Planner(stages, "tiles", "exact").plan(one_prompt(8)).describe()


def test_kept_by_shape() -> None:
    planner = Planner(decoder_outline(2), "iso:2", "exact")
    first = planner.plan(Batch((Segment(0, 0, 5), Segment(1, 9, 3))))
    assert planner.plan(Batch((Segment(2, 1, 8),))) is first
    by_sequence = Planner(decoder_outline(2), "requests", "exact")
    batch = Batch((Segment(0, 0, 5), Segment(1, 9, 3)))
    assert by_sequence.plan(batch).program != by_sequence.plan(one_prompt(8)).program


def test_cuts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="granule of 128"):
        Planner(decoder_outline(1), "iso@100", "exact", granule=128).plan(one_prompt(500))
    with pytest.raises(InputError, match="not a strategy"):
        Planner(decoder_outline(1), "magic", "exact")
