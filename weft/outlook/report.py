"""`weft plan`'s figures as text, JSON and a page. Knows outlooks and pictures; predicts nothing itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from weft.config import ModelConfig
from weft.outlook.figures import GIB, Forecast, Memory, Outlook
from weft.outlook.layouts import Offer, Row
from weft.plan.layouts import Workload
from weft.simulate.hardware import Catalogue
from weft.timeline.figure import INK, figure, name
from weft.timeline.page import ZOOM, document, legend_line, panels
from weft.timeline.timeline import Timeline
from weft.units import digits, duration
from weft.wires import chosen_by_cost

COLUMNS = ("tokens", "wire", "overlap", "predicted ms", "saved", "possible", "bound ms", "decode ms", "plan")
COMPARED = ("layout", "first token", "bound", "saved", "a token", "requests/s", "memory, GiB", "in time")
OFFERED = ("hardware", "layout", "first token", "an hour", "per 1M prompt", "per 1,000 requests", "in time")
TEXT = frozenset({"wire", "overlap", "plan", "hardware", "layout", "in time"})  # columns that read from the left
FACTORS = tuple(2.0**step for step in range(-6, 9))
ASSUMING = (
    "Predicted from makers' figures and the catalogue's assumptions, not measured; docs/predictions.md has the errors."
)


def cells(forecast: Forecast) -> tuple[str, ...]:
    """One forecast as the row of a table, in the order of COLUMNS."""
    f, is_serial = forecast, forecast.overlap == "serial"
    return (
        str(f.tokens), f.wire, f.overlap, f"{f.seconds * 1e3:.1f}", "" if is_serial else f"{f.saving:.1%}",
        f"{f.saving_bound:.1%}", f"{f.bound * 1e3:.1f}", f"{f.decode * 1e3:.2f}", f.plan.split(" · ")[0],
    )  # fmt: skip


def beside(rows: Sequence[Row], first_token: float | None = None) -> list[tuple[str, ...]]:
    """Layouts, in the order of COMPARED, below a line with their group and, if there are several lengths, that.
    `saved`: what overlap takes off serial's time; `first_token`: seconds in which it is wanted."""
    lengths, wires = {row.tokens for row in rows}, {row.wire for row in rows if _sends(row)}
    shown, last = list[tuple[str, ...]](), ""
    for row in rows:
        group = row.hardware + (f", {row.tokens} tokens" if len(lengths) > 1 else "")
        if group != last:
            shown.append((group, *[""] * (len(COMPARED) - 1)))
        last, name = group, f"  {row.layout}"
        name += f", {row.wire}" if wires - {"exact"} and _sends(row) else ""
        if row.rating is None or row.memory is None:
            shown.append((name, *["-"] * (len(COMPARED) - 3), row.why, ""))
            continue
        r, memory = row.rating, row.memory
        shown.append((
            name, duration(r.first_token), duration(r.bound), f"{row.saved:.0%}", duration(r.token),
            digits(r.requests), f"{memory.needed / GIB:.1f} of {memory.usable / GIB:.1f}",
            "" if first_token is None else _yes(r.first_token <= first_token),
        ))  # fmt: skip
    return shown


def priced(rows: Sequence[Row]) -> str:
    """What prices are of."""
    longest = max(row.tokens for row in rows)
    return f"prices for prompts of {longest:,} tokens; requests with {Workload.answer} of answer"


def _sends(row: Row) -> bool:
    """Something travels on its wire."""
    return row.wire != "" and len(row.devices) > row.replicas


def offered(offer: Offer) -> tuple[str, ...]:
    """One offer, in the order of OFFERED."""
    return (
        offer.hardware, offer.layout, duration(offer.first_token), f"{offer.price:.2f}",
        f"{offer.per_million_prompt:.3f}", f"{offer.per_thousand:.2f}",
        "" if offer.in_time is None else _yes(offer.in_time),
    )  # fmt: skip


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def heading(outlook: Outlook) -> str:
    """What this is about."""
    group, shares = outlook.group, outlook.shares
    text = f"{group.text}, link {group.link_name} ({rate(group.link.reached)} each way reached)"
    asked = (("weights", outlook.question.weights), ("keys and values", outlook.question.kv))
    text += "".join(f", {what} in {kept}" for what, kept in asked if kept != "auto")
    return text + (f", shares {','.join(f'{share:.2g}' for share in shares)}" if len(set(shares)) > 1 else "")


def rate(bytes_a_second: float) -> str:
    """In the unit that people use."""
    bits = 8 * bytes_a_second
    number, unit = (bits / 1e9, "Gbit/s") if bits >= 1e9 else (bits / 1e6, "Mbit/s")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def remarks(outlook: Outlook) -> list[str]:
    """Memory, where overlap stops paying, and which sums travel how: a line each."""
    tokens = max(outlook.question.tokens)
    said = [f"memory on the fullest device with {tokens} tokens: {room(outlook.memory[tokens])}"]
    for wire in outlook.question.wires if outlook.group.world > 1 else ():
        until = outlook.pays_until(tokens, wire)
        where = "overlap pays on no link" if until is None else f"overlap pays on links up to {rate(until)}"
        said.append(f"{where}, {tokens} tokens, wire {wire}")
        if chosen_by_cost(wire):
            plan = outlook.plan(tokens, "auto", wire)
            said.append(f"{wire}, {tokens} tokens: {'; '.join((plan.describe(), *plan.why))}")
    return said


def room(memory: Memory) -> str:
    """In GiB."""
    parts = (memory.weights, memory.keys_and_values, memory.working, memory.needed, memory.usable)
    weights, keys, working, needed, usable = (part / GIB for part in parts)
    return (
        f"{needed:.1f} of {usable:.1f} GiB (weights {weights:.1f}, keys and values {keys:.1f}, working {working:.1f})"
    )


def as_json(
    model: ModelConfig, outlooks: Sequence[Outlook], ranked: Sequence[Offer], rows: Sequence[Row] = (),
    concluded: str = "",
) -> str:  # fmt: skip
    """Everything, times in seconds, memory in bytes, rates in bytes a second."""
    return json.dumps(
        {"predicted": True, "model": about(model), "layouts": [asdict(row) for row in rows],
         "conclusion": concluded, "groups": [_group(outlook) for outlook in outlooks],
         "offers": [asdict(offer) for offer in ranked]},
        indent=1,
    )  # fmt: skip


def about(model: ModelConfig) -> dict[str, Any]:
    """The model's dimensions."""
    names = ("model_type", "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")
    return {name: getattr(model, name) for name in names}


def _group(outlook: Outlook) -> dict[str, Any]:
    group, asked = outlook.group, outlook.question
    return {
        "hardware": group.text, "ranks": group.world, "link": group.link_name, "link_rate": group.link.reached,
        "shares": list(outlook.shares), "prompts": asked.prompts, "decoding": asked.decoding or 1,
        "weights": asked.weights, "kv": asked.kv,
        "forecasts": [asdict(f) | {"saving": f.saving, "saving_bound": f.saving_bound} for f in outlook.forecasts],
        "memory": {str(tokens): asdict(m) | {"needed": m.needed} for tokens, m in outlook.memory.items()},
        "pays_until": [
            {"tokens": tokens, "wire": wire, "rate": outlook.pays_until(tokens, wire)}
            for tokens in asked.tokens for wire in asked.wires
        ],
    }  # fmt: skip


def listing(entries: Catalogue) -> list[tuple[str, str, str, str]]:
    """Every device and link: name, what it is, what it can do, source."""
    found = []
    for key, device in entries.device.items():
        able = f"{device.tflops:g} TFLOP/s, {device.memory:g} GiB at {device.bandwidth:g} GB/s, {device.link}"
        found.append((key, device.name, able, device.source))
    for key, link in entries.link.items():
        able = f"{link.rate:g} GB/s, {link.efficiency:.0%} reached, hop {link.hop * 1e6:g} us"
        found.append((key, "link", able, link.source))
    return found


def page(
    model: ModelConfig, outlooks: Sequence[Outlook], ranked: Sequence[Offer], rows: Sequence[Row] = (),
    concluded: str = "", first_token: float | None = None,
) -> str:  # fmt: skip
    """One page with tables, plots and predicted timelines."""
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about(model).items())
    body = [f"<h1>weft plan</h1><p>{escape(facts)}</p><p>{escape(ASSUMING)}</p>"]
    if rows:
        lines = "".join(f"<p>{escape(line)}</p>" for line in concluded.splitlines())
        body.append(f"<h2>Layouts</h2>{_table(COMPARED, beside(rows, first_token))}{lines}")
    if ranked:
        body.append(f"<h2>{priced(rows)}</h2>" + _table(OFFERED, list(map(offered, ranked))))
    drawn = [_timelines(outlook) for outlook in outlooks]
    body.append(f"{ZOOM}{legend_line([timeline for each in drawn for timeline in each])}")
    body += [_section(outlook, each) for outlook, each in zip(outlooks, drawn, strict=True)]
    return document("weft plan", "".join(body))


def _timelines(outlook: Outlook) -> list[Timeline]:
    """Serial's and the best strategy's, for the longest prompt."""
    tokens, wires = max(outlook.question.tokens), outlook.question.wires
    best = min((f for f in outlook.forecasts if f.tokens == tokens and f.wire == wires[0]), key=lambda f: f.seconds)
    return [outlook.timeline(tokens, overlap, wires[0]) for overlap in dict.fromkeys(("serial", best.overlap))]


def _section(outlook: Outlook, shown: Sequence[Timeline]) -> str:
    tokens = max(outlook.question.tokens)
    plots = [_by_tokens(outlook)] if len(outlook.question.tokens) > 1 else []
    plots += [_by_rate(outlook, tokens)] if outlook.group.world > 1 else []
    lines = "".join(f"<p>{escape(remark)}</p>" for remark in remarks(outlook))
    return (
        f"<section><h2>{escape(heading(outlook))}</h2>"
        f"{_table(COLUMNS, [cells(forecast) for forecast in outlook.forecasts])}{lines}{''.join(plots)}"
        f"<details><summary>predicted timelines, {tokens} tokens</summary>{panels(shown)}</details></section>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(tag: str, texts: Sequence[str]) -> str:
        pairs = zip(columns, texts, strict=True)
        inside = (f"<{tag}{' class=text' if column in TEXT else ''}>{escape(text)}</{tag}>" for column, text in pairs)
        return f"<tr>{''.join(inside)}</tr>"

    return (
        f'<div class="scrolling"><table>{row("th", columns)}{"".join(row("td", cells) for cells in rows)}</table></div>'
    )


def _by_tokens(outlook: Outlook) -> str:
    """Time to the first token against the prompt's length."""
    tokens, wire = sorted(outlook.question.tokens), outlook.question.wires[0]

    def draw(axes: Any) -> None:
        for overlap in dict.fromkeys(("serial", *outlook.question.overlaps)):
            one = sorted(
                (f for f in outlook.forecasts if f.overlap == overlap and f.wire == wire), key=lambda f: f.tokens
            )
            axes.plot(tokens, [1e3 * f.seconds for f in one], marker="o", label=overlap)
        axes.plot(tokens, [1e3 * f.bound for f in one], color=INK, linestyle="--", label="bound")
        axes.set_yscale("log")
        name(axes, f"{outlook.group.text}, wire {wire}", "tokens", "predicted prefill, ms", tokens)

    return figure(draw)


def _by_rate(outlook: Outlook, tokens: int) -> str:
    """What `auto` saves on other links."""
    wires = outlook.question.wires

    def draw(axes: Any) -> None:
        for number, wire in enumerate(wires):
            points = outlook.at_rates(tokens, wire, FACTORS)
            speeds = [8 * rate / 1e9 for rate, _, _, _ in points]
            axes.plot(speeds, [100 * saved for _, saved, _, _ in points], color=f"C{number}", label=f"auto, {wire}")
            axes.plot(
                speeds, [100 * most for _, _, most, _ in points], color=f"C{number}", linestyle="--",
                label=f"possible, {wire}",
            )  # fmt: skip
        here = 8 * outlook.group.link.reached / 1e9
        axes.axvline(here, color=INK, alpha=0.5, label=f"{outlook.group.link_name}")
        ticks = [float(f"{speed:.2g}") for speed in speeds[::2]]
        name(axes, f"{tokens} tokens", "link, Gbit/s each way", "predicted saving, % of serial", ticks)

    return figure(draw)
