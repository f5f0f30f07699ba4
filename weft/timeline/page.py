"""Draws timelines as one HTML page: the lanes of svg.py with zoom, and a step's details under the pointer.

The page holds everything that it needs and asks for nothing from anywhere. Knows timelines; knows nothing of how
they were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from weft.timeline.svg import STYLE, heading, lane_names, legend, panel, panel_height
from weft.timeline.timeline import Timeline

PAGE_STYLE = """
body{margin:0} main{padding:16px 24px;background:var(--paper);min-height:100vh;box-sizing:border-box}
h1{font-size:20px} h2{font-size:15px;margin:20px 0 2px} p{margin:2px 0 6px;max-width:60em}
.lanes{display:flex} .names{flex:0 0 120px;position:relative} .names span{position:absolute;line-height:22px}
.scroll{flex:1;overflow-x:auto} .scroll svg{display:block;width:calc(var(--zoom,1)*100%)}
#tip{position:fixed;display:none;pointer-events:none;white-space:pre;background:var(--ink);color:var(--paper);
padding:4px 8px;border-radius:4px;font-size:12px;z-index:9}
table{border-collapse:collapse;margin:8px 0}
td,th{padding:3px 10px;text-align:right;border-bottom:1px solid var(--lane)}
td.text,th.text{text-align:left} tr.best td{font-weight:600} summary{cursor:pointer;margin:6px 0}
label{color:var(--faint)} .scrolling{overflow-x:auto}
"""

SCRIPT = """
const tip = document.getElementById("tip");
const steps = [...document.querySelectorAll("title")].map(title => title.parentNode);
const lit = [];
for (const step of steps) {
  if (step.tagName !== "rect") continue;
  const title = step.querySelector("title");
  step.dataset.tip = title.textContent;
  title.remove();
}
document.addEventListener("pointermove", event => {
  const step = event.target.closest?.("[data-tip]");
  while (lit.length) lit.pop().classList.remove("same");
  tip.style.display = step ? "block" : "none";
  if (!step) return;
  tip.textContent = step.dataset.tip;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  if (!step.dataset.key) return;
  for (const other of step.closest("svg").querySelectorAll(`[data-key="${step.dataset.key}"]`)) {
    other.classList.add("same");
    lit.push(other);
  }
});
const zoom = document.getElementById("zoom");
zoom?.addEventListener("input", () => document.querySelector("main").style.setProperty("--zoom", zoom.value));
"""

ZOOM = '<label>zoom <input id="zoom" type="range" min="1" max="20" step="0.5" value="1"></label>'


def page(timelines: Sequence[Timeline], title: str = "weft timeline") -> str:
    """One page with all of them, on one scale."""
    return document(title, f"<h1>{escape(title)}</h1>{ZOOM}{panels(timelines)}{legend_line(timelines)}")


def panels(timelines: Sequence[Timeline]) -> str:
    """Headings, verdicts and lanes, one timeline below the other, on one scale."""
    scale = max((timeline.seconds for timeline in timelines), default=0.0) or 1.0
    return "".join(_panel(timeline, scale) for timeline in timelines)


def document(title: str, body: str) -> str:
    """A whole page around what is to be shown."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}{PAGE_STYLE}</style></head>\n"
        f'<body><main class="weft">{body}</main><div id="tip" class="weft"></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def legend_line(timelines: Sequence[Timeline]) -> str:
    """What the colours mean."""
    return f'<svg width="100%" height="16" style="margin-top:12px">{legend(timelines)}</svg>'


def _panel(timeline: Timeline, scale: float) -> str:
    height = panel_height(timeline)
    names = "".join(f'<span style="top:{top}px">{escape(name)}</span>' for name, top in lane_names(timeline))
    return (
        f"<section><h2>{escape(heading(timeline))}</h2><p>{escape(timeline.verdict())}</p>"
        f'<div class="lanes"><div class="names">{names}</div><div class="scroll">'
        f'<svg height="{height}">{"".join(panel(timeline, scale))}</svg></div></div></section>\n'
    )
