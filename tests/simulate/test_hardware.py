"""The catalogue, and predictions from it against published measurements."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.outlines import decoder_outline
from weft.errors import InputError
from weft.program.batch import one_prompt
from weft.program.build import build
from weft.program.stages import COMPUTE, Kind
from weft.program.strategy import Strategy
from weft.simulate.hardware import Hardware, Products, Shard, catalogue, costs_of, parse_hardware
from weft.simulate.predicted import simulate
from weft.timeline.timeline import Timeline

TABLE = Path(__file__).parent / "data" / "figure_11a_llama70b_tp8.csv"
ATTENTION = Products((8192, 10 * 128), (8 * 128, 8192), 2.0 * 10 * 128)
MLP = Products((8192, 2 * 3584), (3584, 8192), 3.0 * 3584)
SHARD = Shard(  # an eighth of Llama 70B
    hidden=8192, layer=(("attention", ATTENTION), ("mlp", MLP)), head=("head", Products((8192, 16032))),
    before=("embed",), scored="attention", queries=8 * 128, keys=128,
)  # fmt: skip


def predicted(group: Hardware, strategy: str, tokens: int) -> Timeline:
    batch = one_prompt(tokens)
    program = build(Strategy.parse(strategy), decoder_outline(80), batch)
    return simulate(program, batch, costs_of(group, [SHARD] * group.world, ["exact"]), "exact")


def published() -> list[tuple[int, float, float, float]]:
    with TABLE.open() as lines:
        return [
            (
                int(row["prompt_len"]),
                *(float(row[name]) / 1e3 for name in ("baseline_multimem", "no_ar", "overlap_fused")),
            )
            for row in csv.DictReader(lines)
        ]  # type: ignore[misc]


@pytest.mark.parametrize("row", published(), ids=lambda row: str(row[0]))
def test_h100_table(row: tuple[int, float, float, float]) -> None:
    """One set of constants for all rows: baselines within 15%, savings within 4 percentage points."""
    tokens, baseline, no_collectives, overlapped = row
    serial = predicted(parse_hardware("8x h100", "nvlink4-multimem"), "serial", tokens)
    cut = predicted(parse_hardware("8x h100", "nvlink4-fused"), "iso:2", tokens)
    assert serial.seconds == pytest.approx(baseline, rel=0.15)
    assert serial.busy(0, COMPUTE) == pytest.approx(no_collectives, rel=0.15)
    assert 1 - cut.seconds / serial.seconds == pytest.approx(1 - overlapped / baseline, abs=0.04)


def test_every_entry_is_sound() -> None:
    known = catalogue()
    for name, device in known.device.items():
        assert device.link in known.link and device.source and 0.1 < device.tflops < 5000, name
        assert 0.1 < known.assumption(device, "efficiency") <= 1
    for name, link in known.link.items():
        assert 0 < link.efficiency <= 1 and link.source, name
        assert len(link.bytes) == len(link.sum_us) == len(link.hop_us)
    for wanted in ("rtx3090", "rtx4090", "rtx5090", "l4", "l40s", "a10g", "a100", "a800", "h100", "h200", "b200",
                   "rtxpro6000", "mi300x", "ryzen-7950x", "epyc-9654"):  # fmt: skip
        assert wanted in known.device
    for wanted in ("pcie3-x8", "pcie4-x16-p2p", "pcie5-x16", "nvlink3", "nvlink4", "nvlink5", "ethernet-1g",
                   "ethernet-2.5g", "ethernet-400g", "infiniband-ndr"):  # fmt: skip
        assert wanted in known.link


def test_groups() -> None:
    assert parse_hardware("4x rtx4090").world == 4 and parse_hardware("4X RTX4090").link_name == "pcie4-x16"
    mixed = parse_hardware("1x l4 + 2x a10g", "10gbit")
    assert [device.name for device in mixed.devices] == ["L4", "A10G", "A10G"]
    assert mixed.link.rate == 1.25
    assert parse_hardware("rtx3090").world == 1


@pytest.mark.parametrize(
    ("text", "link", "said"),
    [
        ("4x rtx409", None, "--hardware 'rtx409' is not known; nearest: rtx4090"),
        ("4x rtx4090", "nvlink9", "--link 'nvlink9' is not known; nearest: nvlink"),
        ("4x", None, "--hardware"),
        ("0x l4", None, "give 1 to 256 devices"),
        ("2x h100", "nvlink4-fused", "was measured with 8 ranks, and there are 2"),
    ],
)
def test_what_is_not_there(text: str, link: str | None, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_hardware(text, link)
    assert said in str(caught.value)


OWN = """
[device.shed]
name = "the one in the shed"
tflops = 0.4
memory = 16
bandwidth = 25.6
cores = 4
link = "dirt-road"
source = "measured with sysbench"

[link.dirt-road]
rate = 0.01
efficiency = 0.9
hop = 1e-3
source = "iperf"
"""


def test_own_entries(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    group = parse_hardware("2x shed", None, path)
    assert group.link_name == "dirt-road" and group.devices[0].itemsize == 4
    for old, new, said in (
        ("tflops = 0.4", "tflops = -1", "must be above 0"),
        ('link = "dirt-road"', 'link = "pcie9"', "link 'pcie9' is not known"),
        ("tflops = 0.4", 'tflops = "fast"', "Expected `float`"),
        ("cores = 4", "wheels = 4", "unknown field `wheels`"),
        ("[device.shed]", "[device.shed", "docs/predictions.md shows an entry"),
    ):
        bad = tmp_path / f"bad{len(said)}.toml"
        bad.write_text(OWN.replace(old, new))
        with pytest.raises(InputError, match=r"--catalogue") as caught:
            parse_hardware("2x shed", None, bad)
        assert said in str(caught.value)
    with pytest.raises(InputError, match="can't be read"):
        parse_hardware("l4", None, tmp_path / "nothing.toml")


def test_more_ranks_and_slower_links_cost_what_they_should() -> None:
    """Two ranks swap; more go two hops, of a part each; half the rate is twice the time."""

    def large(text: str, link: str) -> float:
        group = parse_hardware(text, link)
        return costs_of(group, [SHARD] * group.world, ["exact"]).wires["exact"].table(Kind.REDUCE, 8e6).at(8e6)

    assert large("2x h100", "10gbit") == pytest.approx(large("2x h100", "20gbit") * 2, rel=0.02)
    assert large("4x h100", "10gbit") == pytest.approx(large("2x h100", "10gbit") * 1.5, rel=0.03)
