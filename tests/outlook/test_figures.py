"""What `weft plan` predicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.browser import needs_browser, opened
from weft.config import ModelConfig
from weft.errors import InputError
from weft.model.configuration import configured
from weft.outlook.figures import Outlook, Question, planned_shares
from weft.outlook.layouts import compared, conclusion, offers
from weft.outlook.report import as_json, page, remarks
from weft.simulate.hardware import parse_hardware

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
ASKED = Question(tokens=(1024, 8192), overlaps=("iso:2", "auto"), wires=("exact", "int8"))


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return configured(LLAMA_8B)


def test_forecasts_hang_together(model: ModelConfig) -> None:
    outlook = Outlook(model, parse_hardware("4x rtx3090"), ASKED)
    assert len(outlook.forecasts) == 2 * 2 * 3
    for forecast in outlook.forecasts:
        assert forecast.bound <= forecast.seconds * 1.0001 and forecast.bound <= forecast.serial
        assert forecast.serial <= 1.001 * (forecast.compute_alone + forecast.network_alone)
        if forecast.overlap == "auto":
            assert forecast.seconds <= forecast.serial
        assert 0 < forecast.decode < forecast.seconds
    by = {(f.tokens, f.wire, f.overlap): f for f in outlook.forecasts}
    assert by[8192, "exact", "auto"].seconds > 7 * by[1024, "exact", "auto"].seconds
    assert by[8192, "int8", "serial"].network_alone < 0.6 * by[8192, "exact", "serial"].network_alone


def test_more_and_faster_hardware_is_faster(model: ModelConfig) -> None:
    asked = Question((4096,), ("auto",), ("exact",))

    def seconds(text: str, link: str | None = None) -> float:
        return Outlook(model, parse_hardware(text, link), asked).forecasts[-1].seconds

    assert seconds("4x h100") < seconds("2x h100") < seconds("1x h100")
    assert seconds("4x rtx4090", "pcie4-x16-p2p") < seconds("4x rtx4090", "pcie3-x8") < seconds("4x rtx4090", "1gbit")


def test_where_overlap_stops_paying(model: ModelConfig) -> None:
    outlook = Outlook(model, parse_hardware("2x rtx4090"), Question((4096,), ("auto",), ("exact",)))
    until = outlook.pays_until(4096, "exact")
    assert until is not None
    rate = outlook.group.link.reached
    slower, faster = outlook.at_rates(4096, "exact", [until / rate / 2, until / rate * 2])
    assert slower[3] != "serial" and faster[3] == "serial"


def test_memory_says_what_is_missing_and_what_would_fit(model: ModelConfig) -> None:
    with pytest.raises(InputError) as caught:
        Outlook(model, parse_hardware("1x rtx3090"), Question((32768,), ("auto",), ("exact",), prompts=4))
    text = str(caught.value)
    assert "1x rtx3090 doesn't hold this model" in text and "GiB are missing" in text
    assert "what would fit: 3x rtx3090; 1x " in text
    outlook = Outlook(model, parse_hardware("3x rtx3090"), Question((32768,), ("auto",), ("exact",), prompts=4))
    assert outlook.memory[32768].needed < outlook.memory[32768].usable


def test_weights_of_few_bits_fit_and_are_read_faster() -> None:
    """A 70B of 4 bits on two cards of 24 GiB, and a 7B of 8 bits on two small machines."""
    large = configured(LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                                   "num_attention_heads": 64})  # fmt: skip
    asked = Question((1024,), ("auto",), ("exact",))
    with pytest.raises(InputError, match="GiB are missing"):
        Outlook(large, parse_hardware("2x rtx3090"), asked)
    four = Outlook(large, parse_hardware("2x rtx3090"), replace(asked, weights="int4"))
    assert four.memory[1024].weights / 2**30 == pytest.approx(21.4, abs=0.2)
    bound = four.memory[1024].weights / 936e9  # every weight is read once a token
    assert bound < four.forecasts[-1].decode < 2 * bound
    small = configured(LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000})
    plain, eight = (
        Outlook(small, parse_hardware("2x n100", "1gbit"), replace(asked, weights=weights))
        for weights in ("auto", "int8")
    )
    assert eight.memory[1024].weights < 0.27 * plain.memory[1024].weights
    assert eight.forecasts[-1].decode < 0.4 * plain.forecasts[-1].decode
    assert eight.forecasts[-1].compute_alone < 0.6 * plain.forecasts[-1].compute_alone
    with_kv = Outlook(small, parse_hardware("2x n100", "1gbit"), replace(asked, weights="int8", kv="int8"))
    assert with_kv.memory[1024].keys_and_values < 0.27 * eight.memory[1024].keys_and_values


def test_unequal_devices_get_unequal_shares(model: ModelConfig) -> None:
    group = parse_hardware("1x h100 + 1x a100", "nvlink3")
    assert planned_shares(group) == pytest.approx((1.0, 312 / 989.4))
    asked = Question((4096,), ("auto",), ("exact",))
    planned = Outlook(model, group, asked).forecasts[-1].seconds
    equal = Outlook(model, group, Question((4096,), ("auto",), ("exact",), shares=(1, 1))).forecasts[-1].seconds
    assert equal > 1.2 * planned


@pytest.mark.parametrize(
    ("hardware", "asked", "said"),
    [
        ("2x h100", Question((99999,), ("auto",), ("exact",)), "more than the model's context"),
        ("2x h100", Question((100,), ("auto",), ("int3",)), "--wire 'int3' is not known; allowed: exact"),
        ("2x h100", Question((100,), ("magic",), ("exact",)), "not a strategy"),
        ("2x h100", Question((100,), ("auto",), ("exact",), shares=(1.0,)), "1 number for 2 devices"),
    ],
)
def test_bad_questions(model: ModelConfig, hardware: str, asked: Question, said: str) -> None:
    with pytest.raises(InputError) as caught:
        _ = Outlook(model, parse_hardware(hardware), asked).forecasts
    assert said in str(caught.value)


def test_impossible_splits() -> None:
    small = configured(LLAMA_8B | {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 4})
    with pytest.raises(InputError, match="would hold nothing of a model with 4 heads and an MLP of 4; use fewer"):
        Outlook(small, parse_hardware("16x h100"), Question((64,), ("auto",), ("exact",)))


PRICES = {"rtx4090": 0.4, "h100": 2.5}


def test_offers(model: ModelConfig) -> None:
    """Of all layouts, as the table shows them."""
    asked = Question((8192,), ("auto",), ("exact",))
    rows = [
        row
        for text in ("4x rtx4090", "1x h100", "8x h100")
        for row in compared(model, parse_hardware(text), asked, 8192)
    ]
    ranked = offers(rows, PRICES, None)
    assert [o.per_million_prompt for o in ranked] == sorted(o.per_million_prompt for o in ranked)
    fastest = min(ranked, key=lambda o: o.first_token)
    sooner = [row for row in rows if row.rating and row.rating.first_token < fastest.first_token]
    assert not sooner and fastest.hardware == "8x h100"
    only = offers(rows, PRICES, fastest.first_token * 1.01)
    late = len([o for o in only if o.in_time is False])
    assert only[0].in_time and [o.in_time for o in only] == [True] * (len(only) - late) + [False] * late
    assert "Fewest of these devices that give the first of 8192 tokens" in conclusion(
        rows, asked, fastest.first_token * 1.01
    )
    assert f"the soonest is {fastest.hardware} as {fastest.layout}" in conclusion(rows, asked, fastest.first_token / 2)
    for offer in ranked:
        [row] = [row for row in rows if (row.hardware, row.layout) == (offer.hardware, offer.layout)]
        assert row.rating and offer.price == pytest.approx(sum(PRICES[device] for device in row.devices))
        hour = 3600 / row.rating.first_token * 8192 * row.replicas / 1e6  # millions of tokens
        assert offer.per_million_prompt == pytest.approx(offer.price / hour)
        assert offer.per_thousand == pytest.approx(1000 * offer.price / 3600 / row.rating.requests)
    with pytest.raises(InputError, match="--price says nothing of rtx4090"):
        offers(rows, {"h100": 1.0}, None)


def test_each_length_has_its_rows_and_the_best_wire(model: ModelConfig) -> None:
    asked = Question((512, 8192), ("auto",), ("exact", "int8"))
    group = parse_hardware("2x rtx4090")
    rows = [row for tokens in asked.tokens for row in compared(model, group, asked, tokens)]
    one, two = (next(row for row in rows if (row.tokens, row.layout) == (length, "tp 2")) for length in asked.tokens)
    assert one.rating and two.rating and two.rating.first_token > 10 * one.rating.first_token
    exact = [row for row in compared(model, group, replace(asked, wires=("exact",)), 8192) if row.layout == "tp 2"]
    assert two.wire == "int8" and exact[0].rating and exact[0].rating.first_token > two.rating.first_token
    assert conclusion(rows, asked).count("Best (") == 2


def test_as_many_at_a_time_as_memory_holds_unless_a_number_is_asked_for(model: ModelConfig) -> None:
    """And then there must be room for them; what is said of many is said of so many."""
    asked, group = Question((8192,), ("auto",), ("exact",), weights="int4", kv="auto"), parse_hardware("1x rtx3060")
    [row] = compared(model, group, asked, 8192)
    assert row.rating and row.memory and 1 <= row.requests < 8
    assert f"for {row.requests} at a time" in conclusion([row], asked)
    [row] = compared(model, group, replace(asked, decoding=8), 8192)
    assert row.rating is None and "missing" in row.why and row.why != "0.0 missing"
    [row] = compared(model, parse_hardware("1x h100"), asked, 8192)
    assert row.requests == 8


def test_what_would_fit(model: ModelConfig) -> None:
    asked = Question((8192,), ("auto",), ("exact",))
    with pytest.raises(InputError, match="what would fit: 2x rtx3060; 1x rtx3060 with --weights int8; "):
        Outlook(model, parse_hardware("1x rtx3060"), asked)


def test_devices_with_equal_figures_have_prices_of_their_own(model: ModelConfig, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    entry = """
[device.{}]
name = "a card"
tflops = 100
memory = 80
bandwidth = 2000
link = "pcie4-x16"
source = "a cloud's page"
"""
    own.write_text(entry.format("one-cloud") + entry.format("other-cloud"))
    asked = Question((512,), ("auto",), ("exact",))
    rows = compared(model, parse_hardware("2x one-cloud", own=own), asked, 512)
    assert {device for row in rows for device in row.devices} == {"one-cloud"}
    ranked = offers(rows, {"one-cloud": 12.0}, None)
    assert {offer.price for offer in ranked} <= {12.0, 24.0}


def test_fewest_devices_are_those_of_a_replica(model: ModelConfig) -> None:
    asked = Question((8192,), ("auto",), ("exact",))
    rows = compared(model, parse_hardware("4x h100"), asked, 8192)
    said = conclusion(rows, asked, 100.0)
    assert "100 s: 1 of 4x h100, as one alone." in said


def test_json_and_remarks(model: ModelConfig) -> None:
    outlook = Outlook(model, parse_hardware("2x rtx4090"), ASKED)
    data = json.loads(as_json(model, [outlook], []))
    assert data["predicted"] is True and len(data["groups"][0]["forecasts"]) == 12
    assert data["groups"][0]["forecasts"][0].keys() >= {
        "tokens",
        "seconds",
        "serial",
        "bound",
        "saving",
        "plan",
        "decode",
    }
    text = " ".join(remarks(outlook))
    assert "overlap pays on links up to" in text


@needs_browser
def test_the_page(model: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    outlooks = [Outlook(model, parse_hardware(text), ASKED) for text in ("4x rtx4090", "2x h100")]
    rows = [
        row for outlook in outlooks for tokens in ASKED.tokens for row in compared(model, outlook.group, ASKED, tokens)
    ]
    path.write_text(page(model, outlooks, offers(rows, PRICES, 1.0), rows, conclusion(rows, ASKED, 1.0), 1.0))
    with opened(path) as (shown, complaints, requests):
        assert shown.locator("section").count() == 2 * 3  # each with two timelines
        assert shown.locator("svg.plot").count() == 4
        assert shown.locator("table").count() == 4
        assert "Predicted from makers' figures" in shown.inner_text("main")
        shown.locator("summary").first.click()
        assert shown.locator("rect.step").first.is_visible()
        assert complaints == [] and len(requests) == 1
