"""A grid's results as one page: what was saved where, with its bound, and the timelines of serial and the best.

The page holds everything that it needs. Knows points and pictures; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from weft.bench.grid import Point
from weft.bench.plot import groups, saving_plot
from weft.compare import TOLERANCE, Measured
from weft.timeline.page import ZOOM, document, legend_line, panels
from weft.timeline.timeline import Timeline, median

COLUMNS = ("overlap", "wire", "seconds", "predicted", "saved", "range", "possible", "efficiency", "to floor",
           "exposed ms", "MB sent", "by the device", "x exact")  # fmt: skip


def as_json(machine: Mapping[str, Any], model: Mapping[str, Any], points: Sequence[Point], complete: bool) -> str:
    """Everything that was measured, times in seconds. `complete` is False after an interruption."""
    runs = [run for point in points for run in point.as_json()]
    return json.dumps({"machine": machine, "model": model, "complete": complete, "runs": runs}, indent=1) + "\n"


def cells(measured: Measured) -> tuple[str, ...]:
    """One variant as the row of a table, in the order of COLUMNS."""
    m = measured
    low, high = m.saving_range
    is_serial = m.overlap == "serial"
    flag = " !" if m.above_ceiling else ""
    return (
        m.overlap, m.wire, f"{m.median:.3f}", "–" if m.predicted is None else f"{m.predicted:.3f}",
        "" if is_serial else f"{m.saving:.1%}{flag}",
        "" if is_serial else f"{low:.1%} to {high:.1%}", f"{m.saving_bound:.1%}",
        *("" if is_serial or value is None else f"{value:.2f}" for value in (m.overlap_efficiency, m.floor_efficiency)),
        f"{m.exposed * 1e3:.1f}",
        f"{m.bytes_on_wire / 1e6:.2f}", "–" if m.bytes_on_device is None else f"{m.bytes_on_device / 1e6:.2f}",
        "–" if m.times_exact is None else f"{m.times_exact:.2f}",
    )  # fmt: skip


def heading(point: Point) -> str:
    """Where in the grid this is."""
    prompts = f" in {point.prompts} prompts" if point.prompts > 1 else ""
    balance = f" ({point.balance:g} x balance)" if point.balance else ""
    layout = f" ({point.layout.describe()})" if point.layout.several else ""
    return f"{point.tokens} tokens{prompts}, {point.ranks} ranks{layout}, link {point.link}{balance}"


def bounds(point: Point, machine: Mapping[str, Any]) -> str:
    """The two terms of the bound, and what they were worth."""
    first = point.measured[0]
    line = f"compute alone {first.compute_alone:.3f} s: {point.gflops:.0f} GFLOP/s a rank"
    line += f" in matrix products; those of float32 reach {machine['gemm_gflops']:g} by themselves"
    for serial in (m for m in point.measured if m.overlap == "serial" and m.like == m.wire):
        rate = serial.bytes_on_wire * 8 / serial.network_alone / 1e6 if serial.network_alone else 0.0
        line += f"; network alone {serial.network_alone:.3f} s on wire {serial.wire}: {rate:.0f} Mbit/s"
        line += f"; bound {serial.bound:.3f} s, floor with the messages' processor time {serial.floor:.3f} s"
        line += f"; serial {serial.serial_median:.3f} s"
    return line


def conclusion(points: Sequence[Point]) -> str:
    """What the whole grid comes to, in a line or two."""
    hidden = [p.best.overlap_efficiency for p in points if p.best.overlap_efficiency is not None]
    if not hidden:
        if any(m.bytes_on_wire for p in points for m in p.measured):
            return "On these links there was next to nothing to hide."
        return "Nothing was communicated, so there was nothing to hide."
    middle, count = median(hidden), _points(len(hidden))
    line = f"Best strategy of each point: overlap efficiency {middle:.2f} in the median of {count}"
    to_floor = [p.best.floor_efficiency for p in points if p.best.floor_efficiency is not None]
    line += f" ({min(hidden):.2f} to {max(hidden):.2f}){f', to the floor {median(to_floor):.2f}' if to_floor else ''}"
    line += f", saving up to {max(p.best.saving for p in points):.1%}."
    for point in points:
        fastest = min(point.measured, key=lambda m: m.median)
        if len({m.wire for m in point.measured}) > 1 and fastest.times_exact is not None:
            line += f" Link {point.link}: fastest {fastest.overlap}, {fastest.wire}, {fastest.times_exact:.2f} times as"
            line += " fast as serial with all sums exact."
    wrong = sum(m.above_ceiling for p in points for m in p.measured)
    if wrong:
        line += (
            f" {wrong} saving{'s' if wrong > 1 else ''} marked ! exceed what is possible by more than {TOLERANCE:.0%} "
            "of serial's time: the machine drifted between the runs of a round, or something else ran; measure again."
        )
    return line


def _points(count: int) -> str:
    return "1 point" if count == 1 else f"{count} points"


def report(machine: Mapping[str, Any], model: Mapping[str, Any], points: Sequence[Point], complete: bool) -> str:
    """The page."""
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in (*model.items(), *machine.items()))
    body = [f"<h1>weft bench: {escape(str(model['name']))}</h1><p>{escape(facts)}</p>"]
    if not complete:
        body.append("<p><strong>Interrupted: these are the points and rounds until then.</strong></p>")
    body.append(f"<p>{escape(conclusion(points))}</p>")
    body += [saving_plot(group) for group in groups(points)]
    body.append(f"{ZOOM}{legend_line([line for point in points for line in timelines(point)])}")
    body += [_section(point, machine, is_open=point is most_to_hide(points)) for point in points]
    return document("weft bench", "".join(body))


def timelines(point: Point) -> list[Timeline]:
    """Serial's, what was predicted for the best variant, and the best's own, named by where they were measured."""
    serial, best = point.serial(point.best.like), point.best
    shown = [serial.timeline, best.predicted_timeline, best.timeline] if best is not serial else [serial.timeline]
    return [replace(line, title=f"{line.title}: {heading(point)}") for line in shown if line is not None]


def most_to_hide(points: Sequence[Point]) -> Point:
    """The point where most can be saved, which is the one nearest to balance."""
    return max(points, key=lambda point: point.measured[0].saving_bound)


def _section(point: Point, machine: Mapping[str, Any], is_open: bool) -> str:
    head = "".join(f"<th{_text(number)}>{name}</th>" for number, name in enumerate(COLUMNS))
    rows = "".join(
        f"<tr{' class=best' if measured is point.best else ''}>"
        + "".join(f"<td{_text(number)}>{escape(cell)}</td>" for number, cell in enumerate(cells(measured)))
        + "</tr>"
        for measured in point.measured
    )
    return (
        f"<section><h2>{escape(heading(point))}</h2><p>{escape(bounds(point, machine))}; medians of "
        f'{len(point.measured[0].seconds)} rounds</p><div class="scrolling"><table><tr>{head}</tr>{rows}</table></div>'
        f"{''.join(_chosen(point))}"
        f"<details{' open' if is_open else ''}><summary>timelines of serial and the best</summary>"
        f"{panels(timelines(point))}</details></section>\n"
    )


def _chosen(point: Point) -> Iterator[str]:
    for line in wires_chosen(point):
        yield f"<p>{escape(line)}</p>"


def wires_chosen(point: Point) -> Iterator[str]:
    """Of each variant that chose its wires: its plan, and why its sums don't travel on more exact ones."""
    for measured in (m for m in point.measured if m.like != m.wire):
        yield f"{measured.overlap}, {measured.wire}: {measured.plan}"
        yield from measured.why


def _text(column: int) -> str:
    return ' class="text"' if column < 2 else ""
