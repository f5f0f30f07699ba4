"""Steps for some ranks: what is legal on each of them, and of all together."""

from __future__ import annotations

import time

import pytest

from tests.execute.programs import lagging
from tests.outlines import decoder_outline
from weft.program.batch import Batch, Rows, Segment, one_prompt
from weft.program.check import check
from weft.program.divided import demand_whole, representatives
from weft.program.steps import ProgramError
from weft.program.text import parse, write, write_expanded

LAYER = """\
compute  L{n}.attention  a  for {ranks}  after {waits} a
reduce   L{n}.attention  a  for {ranks}
compute  L{n}.attention  b  for {ranks}  after {waits} b
reduce   L{n}.attention  b  for {ranks}
compute  L{n}.mlp        a  for {ranks}  after reduce L{n}.attention a
reduce   L{n}.mlp        a  for {ranks}
compute  L{n}.mlp        b  for {ranks}  after reduce L{n}.attention b
reduce   L{n}.mlp        b  for {ranks}
"""


def layer(number: int, ranks: str, waits: str = "") -> str:
    """The steps of a layer, which wait for that, or for the layer before."""
    return LAYER.format(n=number, ranks=ranks, waits=waits or f"reduce L{number - 1}.mlp")


# Two groups of two ranks with 40 layers each.
PIPELINE = f"""\
chunks  a 0:512  b 512:1024  all 0:1024
compute  embed  a  for 0-1
compute  embed  b  for 0-1
{layer(0, "0-1", "compute embed")}
38x
{layer(1, "0-1")}
1x
{layer(39, "0-1")}
send     L39.mlp  a  for 0-1 to 2-3  after reduce L39.mlp a
send     L39.mlp  b  for 0-1 to 2-3  after reduce L39.mlp b
{layer(40, "2-3", "send L39.mlp")}
39x
{layer(41, "2-3")}
1x
compute  head   all  wanted  for 2-3  after reduce L79.mlp a, reduce L79.mlp b
gather   head   all  wanted
"""

SEND = "send     L39.mlp  a  for 0-1 to 2-3"
EMBED = "send     embed         4:8"


def test_a_pipeline_is_legal_and_reads_back() -> None:
    program, outline = parse(PIPELINE), decoder_outline(80)
    check(program, outline, one_prompt(1024), 4)
    assert parse(write(program)) == program and list(parse(write_expanded(program))) != []
    check(parse(write_expanded(program)), outline, one_prompt(1024), 4)
    assert representatives(program.form, 4) == [0, 2]
    begin = time.perf_counter()
    check(program, outline, one_prompt(1024), 4)
    assert time.perf_counter() - begin < 0.01  # it was proven before


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("38x", "37x", "stands|stand before|already has"),
        ("38x", "200000x", "with 200000 rounds of 8 steps.*over 1000000"),
        ("send     L39.mlp  b  for 0-1 to 2-3  after reduce L39.mlp b\n", "", "does not stand before"),
        ("  after send L39.mlp b", "", "on rank 2: 'compute L40.attention 512.*not after everything"),
        ("  after reduce L39.mlp b\ncompute", "\ncompute", "on rank 0: 'send L39.mlp 512.*not after everything"),
        (SEND, "send     L39.mlp  a  for 0-1 to 2", "no part|rank 3"),
        ("reduce   L40.mlp        a  for 2-3", "reduce   L40.mlp        a  for 2", "no part|on rank 3"),
        ("reduce   L40.mlp        a  for 2-3", "reduce   L40.mlp        a", "on rank 0: .*no single partial"),
        ("compute  L0.mlp        a  for 0-1", "compute  L0.mlp        a", "on rank 2: .*not after everything"),
        ("gather   head   all  wanted", "gather   head   all  wanted  for 2", "on rank 3: head: not all"),
        ("gather   head   all  wanted", "gather   head   all  wanted  for 0-1", "on rank 2: head: not all"),
        ("compute  embed  a  for 0-1", "compute  embed  a  for 0-1 to 2", "a send, and nothing else"),
        (SEND, "send     L39.mlp  a  for 0-1", "a send, and nothing else"),
        (SEND, "send     L39.mlp  a  for 0-1 to 1-3", "send to themselves"),
        (SEND, "send     L39.mlp  a  for 0-1 to 2-4", "there are only 4"),
        (SEND, "send     L39.mlp  a  for 0-1 to 3-2", "line .*don't rise|are no ranks"),
        (SEND, "send     L39.mlp  a  for us to 2-3", "line .*'us' are no ranks"),
        (SEND, "send     L39.mlp  a  for 0-99999 to 2-3", "line .*more than 4096"),
        ("send     L39.mlp  a  ", "send     L39.mlp  a  by one-shot ", "an algorithm a reduce's"),
    ],
)  # fmt: skip
def test_each_rule(old: str, new: str, complaint: str) -> None:
    assert old in PIPELINE
    with pytest.raises(ProgramError, match=complaint):
        check(parse(PIPELINE.replace(old, new, 1)), decoder_outline(80), one_prompt(1024), 4)


TWO = """\
compute  embed         0:4  for 0
compute  embed         4:8  for 0
compute  L0.attention  0:4  for 0
reduce   L0.attention  0:4  for 0
send     L0.attention  0:4  for 0 to 1  after reduce L0.attention 0:4
send     embed         4:8  for 0 to 1
compute  L0.attention  4:8  for 1  after send embed 4:8
reduce   L0.attention  4:8  for 1
compute  L0.mlp        0:4  for 1  after send L0.attention 0:4
reduce   L0.mlp        0:4  for 1
compute  L0.mlp        4:8  for 1  after reduce L0.attention 4:8
reduce   L0.mlp        4:8  for 1
compute  head          0:8  wanted  for 1  after reduce L0.mlp 0:4, reduce L0.mlp 4:8
gather   head          0:8  wanted
"""


def test_keys_and_values_lie_where_they_were_computed() -> None:
    """Sequences may go to different ranks; pieces of one may not."""
    outline = decoder_outline(1)
    check(parse(TWO), outline, Batch((Segment(0, 0, 4), Segment(1, 0, 4))), 2)
    with pytest.raises(ProgramError, match=r"on rank 1: .*earlier rows of the same sequence \(0:4\)"):
        check(parse(TWO), outline, one_prompt(8), 2)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (EMBED, f"compute  embed  4:6  for 1\n{EMBED}", "on rank 1: .*done before"),
        (EMBED, f"compute  embed  4:6  for 2\n{EMBED}", "^'compute.*done before"),
        ("reduce   L0.mlp        4:8  for 1\n", "", "L0.mlp: not all of the rows|not stand before"),
        ("compute  L0.mlp        0:4  for 1  after send L0.attention 0:4",
         "compute  L0.mlp        0:4  for 0  after reduce L0.attention 0:4", "other ranks go on with some"),
        ("compute  embed         4:8  for 0", "compute  embed         4:8", "done before"),
        (" 1  after send L0.attention 0:4", " 1  after send L0.attention 0:4, reduce L0.attention 0:4", "no part"),
        ("gather   head", "send     head          0:8  wanted  for 1 to 2\ngather   head", "and goes on"),
    ],
)  # fmt: skip
def test_each_rule_between_two(old: str, new: str, complaint: str) -> None:
    assert old in TWO
    batch = Batch((Segment(0, 0, 4), Segment(1, 0, 4)))
    with pytest.raises(ProgramError, match=complaint):
        check(parse(TWO.replace(old, new, 1)), decoder_outline(1), batch, 3)


def test_a_stage_is_divided_in_one_way() -> None:
    """A rank has one share of it."""
    both = TWO.replace("for 1", "for 1-2").replace("to 1", "to 1-2")
    mixed = both.replace("L0.mlp        0:4  for 1-2", "L0.mlp        0:4  for 1")
    mixed = mixed.replace(
        "wanted  for 1-2  after reduce L0.mlp 0:4, reduce", "wanted  for 1  after reduce L0.mlp 0:4, reduce"
    )
    with pytest.raises(ProgramError, match=r"'compute L0.mlp 4:8': .*divided over \(1,\)"):
        check(parse(mixed), decoder_outline(1), Batch((Segment(0, 0, 4), Segment(1, 0, 4))), 3)


def test_sums_are_over_the_ranks_that_computed() -> None:
    """Each of two ranks for itself has all that it computed; but nobody has the sum."""
    both = TWO.replace("for 1", "for 1-2").replace("to 1", "to 1-2")
    sequences = Batch((Segment(0, 0, 4), Segment(1, 0, 4)))
    check(parse(both), decoder_outline(1), sequences, 3)
    each = [f"reduce   L0.mlp        {rows}  for {rank}\n" for rows, rank in (("4:8", 1), ("4:6", 2), ("6:8", 2))]
    apart = both.replace("reduce   L0.mlp        4:8  for 1-2\n", "".join(each))
    with pytest.raises(ProgramError, match=r"^'reduce L0.mlp 4:8': for ranks \(1,\), but its rows are"):
        demand_whole(parse(apart), decoder_outline(1), Rows(0, 8), 3)


SCATTERED = """\
compute         embed         0:8  for 0-1
compute         L0.attention  0:8  for 0-1
reduce_scatter  L0.attention  0:8  for 0-1
enter           L0.mlp        0:8  for 0-1  after reduce_scatter L0.attention 0:8
all_gather      L0.mlp        0:8  for 0-1
compute         L0.mlp        0:8  for 0-1  after all_gather L0.mlp 0:8
reduce_scatter  L0.mlp        0:8  for 0-1
enter           head          0:8  for 0-1  after reduce_scatter L0.mlp 0:8
all_gather      head          0:8  for 0-1
compute         head          0:8  wanted  for 0-1  after all_gather head 0:8
gather          head          0:8  wanted
"""


def test_scattered_rows_stay_with_the_ranks_that_have_them() -> None:
    check(parse(SCATTERED), decoder_outline(1), one_prompt(8), 4)
    fewer, later = SCATTERED.partition("compute         L0.mlp")[::2]
    with pytest.raises(ProgramError, match="its rows are those of"):
        check(parse(f"{fewer}compute  L0.mlp{later.replace('0-1', '0')}"), decoder_outline(1), one_prompt(8), 4)
    alone = SCATTERED.replace("all_gather      L0.mlp        0:8  for 0-1", "all_gather      L0.mlp        0:8  for 0")
    alone = alone.replace("L0.mlp        0:8  for 0-1  after all_gather", "L0.mlp        0:8  for 0  after all_gather")
    alone = alone.replace("reduce_scatter  L0.mlp        0:8  for 0-1", "reduce_scatter  L0.mlp        0:8  for 0")
    with pytest.raises(ProgramError):
        check(parse(alone), decoder_outline(1), one_prompt(8), 4)


def test_nothing_is_sent_that_the_next_stage_goes_without() -> None:
    """Stages that read one input are on the same ranks; behind both of them rows may go on."""
    with pytest.raises(ProgramError, match="no stage reads all that came to these rows"):
        outline = lagging(decoder_outline(1), 0, 1)
        check(parse(TWO), outline, Batch((Segment(0, 0, 4), Segment(1, 0, 4))), 2)
    check(parse(PIPELINE), lagging(decoder_outline(80), 0, 1), one_prompt(1024), 4)
    with pytest.raises(ProgramError, match="no stage reads all that came to these rows"):
        check(parse(PIPELINE), lagging(decoder_outline(80), 1, 0), one_prompt(1024), 4)


def test_those_who_have_the_vocabulary_may_be_told_alone() -> None:
    alone = PIPELINE.replace("gather   head   all  wanted", "gather   head   all  wanted  for 2-3")
    check(parse(alone), decoder_outline(80), one_prompt(1024), 4)
