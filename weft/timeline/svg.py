"""Draws timelines as SVG: a row for each lane of a rank, steps coloured by their part of the model, waiting marked.

Everything is placed in percent of the drawing's width, so that a page can stretch it. Knows timelines; knows nothing
of how they were made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import log10

from weft.program.stages import COMPUTE
from weft.timeline.timeline import Event, Timeline, Wait

LANE, GAP, TOP, AXIS = 22, 10, 4, 20  # heights in pixels
PARTS = 4  # of a layer that have colours of their own
LABELS = 120  # width of the lanes' names
WIDTH = 1200

STYLE = """
.weft{--ink:#1f2933;--paper:#fff;--faint:#9aa5b1;--lane:#eef1f4;--part0:#2f7fd6;--part1:#e8a33d;--part2:#4f9d69;--part3:#b5523b;--other:#8f6bc9;
--wait:#d64545;font:13px system-ui,sans-serif;color:var(--ink)}
@media (prefers-color-scheme:dark){.weft{--ink:#e4e7eb;--paper:#11151a;--faint:#7b8794;--lane:#222a33;
--part0:#5aa2ee;--part1:#f0b95b;--part2:#79c795;--part3:#e08a72;--other:#b295e6;--wait:#ff7b72}}
.weft text{fill:var(--ink)} .weft .faint{fill:var(--faint);font-size:11px}
.weft .title{font-weight:600;font-size:14px} .weft .lane{fill:var(--lane)} .weft .tick{stroke:var(--lane)}
.weft .step{stroke:var(--paper);stroke-width:.5} .weft .part0{fill:var(--part0)} .weft .part1{fill:var(--part1)}
.weft .part2{fill:var(--part2)} .weft .part3{fill:var(--part3)}
.weft .other{fill:var(--other)} .weft .network{opacity:.75}
.weft .wait{fill:var(--wait);fill-opacity:.55} .weft .idle{fill:none} .weft .same{stroke:var(--ink);stroke-width:2}
"""


def svg(timelines: Sequence[Timeline]) -> str:
    """A picture of its own, for a browser or a README: one timeline below the other, on one scale."""
    scale = max((timeline.seconds for timeline in timelines), default=0.0) or 1.0
    parts, y = [], 10
    for timeline in timelines:
        height = panel_height(timeline)
        parts.append(f'<text class="title" x="12" y="{y + 12}">{escape(heading(timeline))}</text>')
        parts.append(f'<text x="12" y="{y + 31}">{escape(timeline.verdict())}</text>')
        parts += [f'<text x="12" y="{y + 40 + top + 16}">{escape(name)}</text>' for name, top in lane_names(timeline)]
        inner = "".join(panel(timeline, scale))
        parts.append(f'<svg x="{LABELS}" y="{y + 40}" width="{WIDTH - LABELS - 24}" height="{height}">{inner}</svg>')
        y += 40 + height + 12
    parts.append(f'<g transform="translate({LABELS} {y})">{legend(timelines)}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="weft" viewBox="0 0 {WIDTH} {y + 24}" width="{WIDTH}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def heading(timeline: Timeline) -> str:
    """What is drawn: title, measured or predicted, seconds."""
    return " · ".join(part for part in (timeline.title, timeline.source, f"{timeline.seconds * 1e3:.1f} ms") if part)


def panel_height(timeline: Timeline) -> int:
    """Pixels that `panel` takes."""
    return TOP + len(timeline.ranks) * _rank_height(timeline) + AXIS


def _rank_height(timeline: Timeline) -> int:
    return len(timeline.lanes) * (LANE + 2) - 2 + GAP


def lane_names(timeline: Timeline) -> Iterator[tuple[str, int]]:
    """Each lane's name and the y of its top within the panel."""
    for place, rank in enumerate(timeline.ranks):
        for offset, lane in enumerate(timeline.lanes):
            yield f"rank {rank} {lane}", TOP + place * _rank_height(timeline) + offset * (LANE + 2)


def panel(timeline: Timeline, scale: float) -> Iterator[str]:
    """The lanes of every rank and the axis below; `scale` is how many seconds the whole width stands for."""
    tops, colours = dict(lane_names(timeline)), _colours(timeline)
    yield from _axis(scale, panel_height(timeline))
    for rank in timeline.ranks:
        for lane in timeline.lanes:
            y = tops[f"rank {rank} {lane}"]
            yield f'<rect class="lane" x="0" y="{y}" width="{_percent(timeline.seconds, scale)}" height="{LANE}"/>'
            for event in timeline.lane(rank, lane):
                yield _step(event, timeline.begin, scale, y, colours[event.stage.rpartition(".")[2]])
        for wait in timeline.waits(rank):
            yield _wait(wait, rank, timeline.begin, scale, tops[f"rank {rank} {COMPUTE}"])


def _colours(timeline: Timeline) -> dict[str, str]:
    """The class of each part of the model."""
    parts = enumerate(timeline.parts.items())
    return {part: f"part{number % PARTS}" if layered else "other" for number, (part, layered) in parts}


def _step(event: Event, begin: float, scale: float, y: int, colour: str) -> str:
    tip = f"rank {event.rank}: {event.kind} {event.stage} {event.rows}\n{_span(event.start - begin, event.seconds)}"
    return (
        f'<rect class="step {colour} {event.lane}" data-key="{event.stage} {event.rows}" '
        f'x="{_percent(event.start - begin, scale)}" y="{y}" width="{_percent(event.seconds, scale)}" '
        f'height="{LANE}"><title>{escape(tip)}</title></rect>'
    )


def _wait(wait: Wait, rank: int, begin: float, scale: float, y: int) -> str:
    seconds = wait.stop - wait.start
    why = f"while {wait.behind.kind} {wait.behind.stage} {wait.behind.rows} travels" if wait.behind else "both lanes"
    tip = f"rank {rank}: computes nothing {why}\n{_span(wait.start - begin, seconds)}"
    return (
        f'<rect class="{"wait" if wait.behind else "idle"}" x="{_percent(wait.start - begin, scale)}" y="{y}" '
        f'width="{_percent(seconds, scale)}" height="{LANE}"><title>{escape(tip)}</title></rect>'
    )


def _span(start: float, seconds: float) -> str:
    return f"{start * 1e3:.2f} to {(start + seconds) * 1e3:.2f} ms ({seconds * 1e3:.2f} ms)"


def _axis(scale: float, height: int) -> Iterator[str]:
    step = _nice(scale / 8)
    for number in range(int(scale / step) + 1):
        x = _percent(number * step, scale)
        yield f'<line class="tick" x1="{x}" x2="{x}" y1="0" y2="{height - AXIS + 4}"/>'
        side = 'dx="2"' if number * step < 0.94 * scale else 'dx="-2" text-anchor="end"'  # at the edge it is cut off
        yield f'<text class="faint" x="{x}" {side} y="{height - 4}">{number * step * 1e3:g} ms</text>'


def _nice(seconds: float) -> float:
    """The next larger one of 1, 2, 5, 10, … of some power of ten."""
    power: float = 10.0 ** int(log10(seconds) // 1)
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= seconds * 0.999)


def _percent(seconds: float, scale: float) -> str:
    return f"{100 * seconds / scale:.4f}%"


def legend(timelines: Sequence[Timeline]) -> str:
    """What the colours mean, in all of these."""
    colours = {part: colour for timeline in timelines for part, colour in _colours(timeline).items()}
    named: dict[str, list[str]] = {}
    for part, colour in sorted(colours.items(), key=lambda entry: entry[1] == "other"):
        named.setdefault(colour, []).append(part)
    entries = [(colour, ", ".join(parts)) for colour, parts in named.items()]
    entries += [("wait", "computes nothing while something travels: exposed"), ("lane", "idle")]
    x, drawn = 0, []
    for colour, text in entries:
        drawn.append(f'<rect class="{colour}" x="{x}" y="0" width="14" height="12"/>')
        drawn.append(f'<text x="{x + 20}" y="11">{escape(text)}</text>')
        x += 44 + 7 * len(text)
    return "".join(drawn)
