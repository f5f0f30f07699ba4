"""Builders: the schedules that the design describes."""

from __future__ import annotations

import pytest

from weft.program.batch import Batch, Segment, one_prompt
from weft.program.build import build
from weft.program.check import check
from weft.program.steps import decoder_stages
from weft.program.strategy import Strategy

SERIAL = """\
compute  embed         0:8
compute  L0.attention  0:8
reduce   L0.attention  0:8
compute  L0.mlp        0:8  after reduce L0.attention 0:8
reduce   L0.mlp        0:8
compute  head          0:8  after reduce L0.mlp 0:8
gather   head          0:8
"""

ISO = """\
compute  embed         0:8
compute  L0.attention  0:4
reduce   L0.attention  0:4
compute  L0.attention  4:8
reduce   L0.attention  4:8
compute  L0.mlp        0:4  after reduce L0.attention 0:4
reduce   L0.mlp        0:4
compute  L0.mlp        4:8  after reduce L0.attention 4:8
reduce   L0.mlp        4:8
"""

AHEAD = """\
compute  embed         0:9
compute  L0.attention  0:3
reduce   L0.attention  0:3
compute  L0.attention  3:6
reduce   L0.attention  3:6
compute  L0.mlp        0:3  after reduce L0.attention 0:3
reduce   L0.mlp        0:3
compute  L0.attention  6:9
reduce   L0.attention  6:9
compute  L0.mlp        3:6  after reduce L0.attention 3:6
reduce   L0.mlp        3:6
compute  L0.mlp        6:9  after reduce L0.attention 6:9
reduce   L0.mlp        6:9
compute  head          0:9  after reduce L0.mlp 0:3, reduce L0.mlp 3:6, reduce L0.mlp 6:9
gather   head          0:9
"""

TILES = """\
body     L0.attention  0:8
tail     L0.attention  0:4
reduce   L0.attention  0:4
tail     L0.attention  4:8
reduce   L0.attention  4:8
body     L0.mlp        0:8  after reduce L0.attention 0:4, reduce L0.attention 4:8
"""


SCATTERED = """\
compute         L0.attention  0:4
reduce_scatter  L0.attention  0:4
compute         L0.attention  4:8
enter           L0.mlp        0:4  after reduce_scatter L0.attention 0:4
all_gather      L0.mlp        0:4
reduce_scatter  L0.attention  4:8
compute         L0.mlp        0:4  after all_gather L0.mlp 0:4
enter           L0.mlp        4:8  after reduce_scatter L0.attention 4:8
all_gather      L0.mlp        4:8
reduce_scatter  L0.mlp        0:4
compute         L0.mlp        4:8  after all_gather L0.mlp 4:8
"""


@pytest.mark.parametrize(
    ("strategy", "part"), [("serial", SERIAL), ("iso:2", ISO), ("tiles:2", TILES), ("iso:2+rs", SCATTERED)]
)
def test_schedules(strategy: str, part: str) -> None:
    assert part in str(build(Strategy.parse(strategy), decoder_stages(1), one_prompt(8)))


def test_earlier_chunks_go_ahead() -> None:
    """Attention of a later chunk stands between two stages of an earlier one."""
    assert str(build(Strategy.parse("iso:3+ahead"), decoder_stages(1), one_prompt(9))) == AHEAD


@pytest.mark.parametrize(
    "strategy",
    [
        "serial",
        "iso:2",
        "iso:3",
        "iso:2/4",
        "iso:4/2",
        "iso@3,9/5",
        "tiles:4",
        "requests",
        "iso:2/4+tiles:3",
        "requests:2+tiles:2",
        "rs",
        "iso:2+rs",
        "iso:4+rs",
        "iso@3,9+rs",
        "requests+rs",
        "iso:2+ahead",
        "iso:3+ahead",
        "iso@3,9+ahead",
        "requests+ahead",
    ],
)
@pytest.mark.parametrize("lengths", [(1,), (2,), (17,), (700,), (3, 1, 90), (1, 1, 1, 1)])
def test_built_programs_are_legal(strategy: str, lengths: tuple[int, ...]) -> None:
    batch = Batch(tuple(Segment(slot, 5 * slot, length) for slot, length in enumerate(lengths)))
    stages = decoder_stages(3)
    check(build(Strategy.parse(strategy), stages, batch), stages, batch)
