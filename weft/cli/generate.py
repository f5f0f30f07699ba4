"""`weft generate`: one prompt, completed on the terminal, with what it achieved."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from weft.cli.options import (
    DTYPE,
    KV,
    LAYERS,
    LAYOUT,
    LINK,
    MODEL,
    OPTIMISE,
    OVERLAP,
    PP,
    RECALIBRATE,
    REPRODUCIBLE,
    SHARES,
    STORED,
    THREADS,
    TP,
    TRANSPORT,
    WIRE,
    layers_or_auto,
    ranks_or_auto,
    shares_or_auto,
)
from weft.cli.terminal import bar, loaded
from weft.compare import Measured, compare
from weft.errors import InputError, RequestFailed
from weft.llm import LLM, RequestOutput
from weft.opening import GIVEN
from weft.plan.candidates import WORTH
from weft.program.batch import one_prompt
from weft.program.strategy import AUTO
from weft.text import leave_torch_out
from weft.timeline.files import demand_form, demand_writable, timelines_as, write
from weft.timeline.terminal import terminal
from weft.timeline.timeline import Timeline

HELP = """Complete PROMPT with MODEL, and say how fast it was.

MODEL is a directory in Hugging Face format, a .gguf file, or a hub id, as in Qwen/Qwen3-0.6B or owner/repo:Q4_K_M;
without it, the small model in the package. Without PROMPT, standard input is read.

Examples:

  weft generate "The for statement is used to"

  weft generate Qwen/Qwen3-0.6B "Once upon a time" --tp 2 --max-tokens 64

  weft generate ./SmolLM2-135M-Instruct.Q4_1.gguf "The capital of France is" --tp 2

  weft generate ./llama "Once" --tp 2 --pp 2 --layers 20,12             # a pipeline of two sections, two ranks each

  weft generate ./llama --tp 3 --shares 2,1,1 --temperature 0 --json < prompt.txt

  weft generate "def main(" --tp 2 --overlap iso:2/4 --compare

  weft generate --tp 2 --link 1x --compare < prompt.txt              # as over a link at balance; or 200mbit,5ms

  weft generate "def main(" --tp 2 --overlap iso:2 --timeline where-the-time-went.html
"""


@dataclass(frozen=True)
class _Timing:
    """Seconds and tokens of one generation; no first token if it was to have none."""

    first_token: float | None
    seconds: float
    prompt_tokens: int
    tokens: int

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first one."""
        rest = self.seconds - self.first_token if self.first_token is not None else 0.0
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else None

    def describe(self) -> str:
        """When the first token came."""
        return "no token" if self.first_token is None else f"first token after {self.first_token * 1e3:.1f} ms"


def generate(
    model: MODEL = None,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", show_default=False)] = None,
    tp: TP = "1", pp: PP = 1, layers: LAYERS = None, layout: LAYOUT = None, optimise: OPTIMISE = "latency",
    overlap: OVERLAP = "auto", wire: WIRE = "exact",
    transport: TRANSPORT = "auto", link: LINK = "none",
    dtype: DTYPE = "float32",
    weights: STORED = "auto",
    kv: KV = "auto",
    shares: SHARES = None,
    reproducible: REPRODUCIBLE = False,
    recalibrate: RECALIBRATE = False,
    threads: THREADS = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the checkpoint's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens with this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens; 0 is all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens less likely than this part of the top.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 avoids tokens that were there.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same draw again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the completion; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    compare_with_serial: Annotated[
        bool, typer.Option("--compare", help="Then measure this prompt: serial, overlapped, bound; draw it.")
    ] = False,
    timeline: Annotated[
        Path | None, typer.Option(help="--compare, and write the timelines to this .json, .svg or .html file.")
    ] = None,
) -> None:  # fmt: skip
    """See HELP."""
    leave_torch_out()
    model, text = _model_and_prompt(model, prompt)
    if timeline is not None:
        demand_form(timeline, "--timeline")
        demand_writable(timeline, "--timeline")
    errors = Console(stderr=True)
    given = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty)
    with loaded(
        errors, model, tensor_parallel_size=ranks_or_auto(tp), pipeline_parallel_size=pp,
        layers=layers_or_auto(layers), layout=layout or GIVEN, optimise=optimise, overlap=overlap, wire=wire,
        transport=transport, link=link, shares=shares_or_auto(shares), reproducible=reproducible,
        num_threads=threads, dtype=dtype, weights=weights, kv_cache_dtype=kv, recalibrate=recalibrate,
    ) as llm:  # fmt: skip
        params = llm.get_default_sampling_params(
            **{name: value for name, value in given.items() if value is not None},
            max_tokens=max_tokens, seed=seed, stop=stop or None,
        )  # fmt: skip
        output, timing = _stream(llm, text, params, show=not as_json)
        comparison = None
        if compare_with_serial or timeline is not None:
            comparison = _compared(errors, llm, output.prompt_token_ids, overlap)
            if timeline is not None:
                write(timeline, timelines_as(timeline, _drawn(comparison)))
        if as_json:
            print(json.dumps(_as_json(llm, output, timing, comparison), ensure_ascii=False))
        else:
            _report(errors, llm, timing, comparison)


def _model_and_prompt(first: str | None, second: str | None) -> tuple[str | None, str]:
    """One argument is the prompt, unless it is a directory, a .gguf file, or has the form of a hub id."""
    if first is not None and second is None and not _names_a_model(first):
        first, second = None, first
    if second is None:
        if sys.stdin.isatty():
            raise InputError('no prompt was given; try: weft generate "The for statement is used to"')
        second = sys.stdin.read()
    if not second:
        raise InputError("the prompt is empty; give at least one character")
    return first, second


def _names_a_model(text: str) -> bool:
    return (
        Path(text).is_dir()
        or text.lower().endswith(".gguf")
        or re.fullmatch(r"[\w.~-]*(/[\w.-]+)+/?(:[\w.-]+)?", text) is not None
    )


def _stream(llm: LLM, prompt: str, params: Any, show: bool) -> tuple[RequestOutput, _Timing]:
    """Prints the text as it comes."""
    import time

    begin = time.perf_counter()
    for piece in llm.stream(prompt, params):
        if isinstance(piece, RequestOutput):
            output = piece
        elif show:
            sys.stdout.write(piece)
            sys.stdout.flush()
    seconds = time.perf_counter() - begin
    if show:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if output.error is not None:
        raise RequestFailed(output.error)
    tokens = sum(len(completion.token_ids) for completion in output.outputs)
    return output, _Timing(output.time_to_first_token, seconds, len(output.prompt_token_ids), tokens)


def _compared(errors: Console, llm: LLM, tokens: list[int], overlap: str, rounds: int = 5) -> list[Measured]:
    """Serial first, on each wire that it is held against, then the strategy."""
    with bar(errors) as progress:
        task = progress.add_task("measuring", total=rounds + 1)
        return compare(llm.engine, tokens, [overlap], rounds, lambda: progress.advance(task))


def _drawn(comparison: list[Measured]) -> list[Timeline]:
    """The strategy's timeline, what was predicted of it, and serial's."""
    best = comparison[-1]
    serial = next(measured for measured in comparison if (measured.overlap, measured.wire) == ("serial", best.like))
    again = serial is best or best.plan.startswith("serial")  # the same runs
    shown = [best.timeline, best.predicted_timeline, None if again else serial.timeline]
    return [timeline for timeline in shown if timeline is not None]


def _as_json(llm: LLM, output: RequestOutput, timing: _Timing, comparison: list[Measured] | None) -> dict[str, Any]:
    first, plan = output.outputs[0], llm.engine.planner.plan(one_prompt(timing.prompt_tokens))
    result: dict[str, Any] = {
        "model": str(llm.engine.path), "prompt": output.prompt, "text": first.text,
        "token_ids": first.token_ids, "finish_reason": first.finish_reason, "prompt_tokens": timing.prompt_tokens,
        "time_to_first_token": timing.first_token, "decode_tokens_per_second": timing.decode_rate,
        "layout": str(llm.engine.config.layout), "layers": list(llm.engine.config.layout.layers),
        "plan": plan.describe(), "why": list(plan.why), "predicted": None,
        "notices": list(llm.engine.notices),
    }  # fmt: skip
    if plan.predicted is not None:
        predicted = plan.predicted
        result["predicted"] = {"seconds": predicted.seconds, "serial": predicted.serial, "bound": predicted.bound}
    if comparison is not None:
        plain = asdict(comparison[-1]) | {"tokens": timing.prompt_tokens, "median": comparison[-1].median}
        result["comparison"] = {name: value for name, value in plain.items() if "timeline" not in name}
    return result


def _report(console: Console, llm: LLM, timing: _Timing, comparison: list[Measured] | None) -> None:
    plan = llm.engine.planner.plan(one_prompt(timing.prompt_tokens))
    answer = "1 token" if timing.tokens == 1 else f"{timing.tokens} tokens"
    answer += f", {timing.decode_rate:.1f} tokens/s after the first" if timing.decode_rate else ""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("prompt", f"{timing.prompt_tokens} tokens, {timing.describe()}")
    table.add_row("answer", answer)
    if llm.engine.config.layout.several:
        table.add_row("layout", llm.engine.config.layout.describe())
    table.add_row("plan", plan.describe())
    for line in plan.why:
        table.add_row("wires", line)
    if plan.predicted is not None:
        table.add_row("predicted", f"for the prompt's pass: {plan.predicted.describe()}")
    console.print(table)
    for notice in [*llm.engine.notices, *filter(None, [llm.engine.planner.drift.describe()])]:
        console.print(notice, style="dim")
    if comparison is not None:
        _report_comparison(console, timing.prompt_tokens, comparison[-1])


def _report_comparison(console: Console, tokens: int, best: Measured) -> None:
    table = Table(title=f"prefill of {tokens} tokens, medians of {len(best.seconds)} rounds")
    for column in ("", "ms", "of serial"):
        table.add_column(column, justify="left" if not column else "right")
    chosen = best.like != best.wire
    on = f", {best.like}" if chosen else ""
    rows = {"serial, exact": best.times_exact * best.median} if chosen and best.times_exact else {}
    rows |= {
        "compute alone": best.compute_alone, f"network alone{on}": best.network_alone,
        "bound: the larger one": best.bound, f"serial{on}": best.serial_median, best.overlap: best.median,
    }  # fmt: skip
    # Medians of rounds' ratios, as in the line below the table.
    larger = "compute alone" if best.compute_alone >= best.network_alone else f"network alone{on}"
    shares = dict.fromkeys((larger, "bound: the larger one"), 1 - best.saving_bound) | {best.overlap: 1 - best.saving}
    for name, seconds in rows.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{shares.get(name, seconds / best.serial_median):.0%}")
    console.print(table)
    if best.overlap == AUTO and best.plan.startswith("serial"):
        console.print(f"auto is serial here: no cut is predicted to save {WORTH:.1%}")
    else:
        console.print(_verdict(best.saving, best.saving_bound, best.overlap_efficiency))
    if chosen and best.times_exact:
        console.print(f"{best.times_exact:.2f} times as fast as serial with all sums exact")
    for timeline in filter(None, [best.timeline, best.predicted_timeline]):
        console.print(terminal(timeline, width=max(20, min(100, console.width - 18))))


def _verdict(saving: float, possible: float, efficiency: float | None) -> str:
    if efficiency is None:
        return "On this link there is next to nothing to hide: the bound is serial's own time."
    saves = f"saves {saving:.1%} of serial's time" if saving >= 0 else f"takes {-saving:.1%} longer than serial"
    line = f"{saves}; possible {possible:.1%}; overlap efficiency {efficiency:.2f}"
    if saving < 0:
        line += ". The link is too fast for this prompt: cutting costs more than it hides; use serial"
    return line
