"""Tools that measure and judge servers, and frameworks of agents, unchanged, against `weft serve`.

    python benchmarks/clients/run.py [lm-eval guidellm aiperf langchain llamaindex litellm llm] [--json FILE]

Each is installed into an environment of its own under --folder, at the version below, if it is not there already
(lm-eval and the model that it compares with take about 1.5 GB); then a server with the model in the package is started
for it and the tool is run as its users run it. Every answer must be one; what lm-eval reports must be what it reports
for transformers on the same model, to 1e-3. Frameworks call one of two tools, send back what it gave, and run their own
loop (agents.py): the model is far too small for good answers, so what is looked at is that calls parse and loops end.

Needs packages from an index, once; then it works offline.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from servers import ROOT, serving

MODEL = ROOT / "weft" / "packaged"
NAME = "weft-packaged"
TORCH = "torch==2.13.0"  # first: what tools ask for might be another one, with gigabytes for GPUs
TOLERANCE = 1e-3
REQUESTS = 8
TEXTS = ("weft/engine.py", "weft/text.py", "weft/config.py", "weft/server/service.py")  # the model knows Python


@dataclass(frozen=True)
class Tool:
    """What to install, and how it is run against a server; the result has a line for each of its claims."""

    packages: tuple[str, ...]
    run: Callable[[Path, str, Path], dict[str, Any]]
    torch: bool = True


def call(command: list[str], folder: Path, **environment: str) -> str:
    """What a command says; ends this program if it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=1800, check=False,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200", **environment},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout + done.stderr


def installed(folder: Path, name: str, packages: tuple[str, ...], torch: bool) -> Path:
    """The programs of an environment that has these packages."""
    place = folder / name
    done = place / "installed.txt"
    if not (done.is_file() and done.read_text("utf-8") == " ".join(packages)):
        print(f"installing {' '.join(packages)} into {place}", file=sys.stderr, flush=True)
        call([sys.executable, "-m", "venv", "--clear", str(place)], ROOT)
        for wanted in ([TORCH], packages) if torch else (packages,):
            call([str(place / "bin" / "pip"), "install", "-q", *wanted], ROOT)
        done.write_text(" ".join(packages), "utf-8")
    return place / "bin"


# lm-eval


def documents() -> list[str]:
    """Paragraphs of our own texts, of a length that says something."""
    text = "\n\n".join((ROOT / name).read_text("utf-8") for name in TEXTS)
    return [part for part in text.split("\n\n") if 150 < len(part) < 1500][:40]


def tasks(folder: Path) -> list[str]:
    """Writes a task for each kind of question that lm-eval asks; their names."""
    paragraphs = documents()
    endings = [part.split()[-1] for part in paragraphs]
    rows = [
        {
            "text": part, "context": " ".join(part.split()[:-1]), "ending": " " + endings[number],
            "choices": [" " + endings[(number + other) % len(endings)] for other in range(4)], "label": 0,
        }
        for number, part in enumerate(paragraphs)
    ]  # fmt: skip
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}

    def metrics(*names: str) -> list[dict[str, Any]]:
        return [{"metric": name} for name in names]

    made: dict[str, dict[str, Any]] = {
        "weft_rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
        },
        "weft_ending": {
            "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{ending}}",
            "metric_list": metrics("perplexity", "acc"),
        },
        "weft_choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "label", "metric_list": metrics("acc", "acc_norm"),
        },
        "weft_answer": {
            "output_type": "generate_until", "doc_to_text": "{{context}}", "doc_to_target": "{{ending}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 24},
            "metric_list": metrics("exact_match"),
        },
    }  # fmt: skip
    for name, task in made.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}), "utf-8")  # JSON is YAML
    return list(made)


def lm_eval(programs: Path, url: str, folder: Path) -> dict[str, Any]:
    """The same tasks by the server and by transformers."""
    names = ",".join(tasks(folder))
    served = f"model={NAME},base_url={url}/v1/completions,tokenizer={MODEL},tokenizer_backend=huggingface,"
    models = {
        "served": ("local-completions", served + "num_concurrent=2,max_length=2048"),
        "alone": ("hf", f"pretrained={MODEL},dtype=float32,max_length=2048"),
    }
    found: dict[str, dict[str, Any]] = {}
    samples: dict[str, dict[str, Any]] = {}
    for which, (model, arguments) in models.items():
        out = folder / which
        call(
            [str(programs / "lm-eval"), "run", "--model", model, "--model_args", arguments, "--tasks", names,
             "--include_path", str(folder), "--output_path", str(out), "--log_samples", "--batch_size", "4"],
            folder, HF_HOME=str(folder / "home"), OPENAI_API_KEY="none",
        )  # fmt: skip
        [result] = out.rglob("results_*.json")
        found[which] = json.loads(result.read_text("utf-8"))["results"]
        samples[which] = {
            path.name.split("_2")[0]: [json.loads(line)["resps"] for line in path.read_text("utf-8").splitlines()]
            for path in out.rglob("samples_*.jsonl")
        }
    lines, worst = {}, 0.0
    for task, values in sorted(found["alone"].items()):
        for name, value in values.items():
            if isinstance(value, float) and "stderr" not in name:
                other = found["served"][task][name]
                apart = abs(other - value) / max(1.0, abs(value))
                worst = max(worst, apart)
                lines[f"{task} {name.split(',')[0]}"] = {"transformers": value, "weft": other, "apart": apart}
    assert lines and {line.split()[0] for line in lines} == set(names.split(",")), lines
    answers = [samples[which]["samples_weft_answer"] for which in models]
    alike = sum(one == other for one, other in zip(*answers, strict=True))
    assert any(any(text.strip() for [text] in one) for one in answers[0]), answers[0]
    said = f"{alike} of {len(answers[0])} greedy answers are the same text"
    return {"fine": worst <= TOLERANCE and alike == len(answers[0]), "worst": worst, "answers": said, "values": lines}


# guidellm


def guidellm(programs: Path, url: str, folder: Path) -> dict[str, Any]:
    """Two streams at once."""
    out = folder / "guidellm.json"
    call(
        [str(programs / "guidellm"), "run",
         "--backend", f"kind=openai_http,target={url},model={NAME},request_format=/v1/completions",
         "--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={REQUESTS}",
         "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=8",
         "--tokenizer", f"kind=huggingface_auto,model={MODEL}", "--output", f"kind=json,path={out}"], folder,
    )  # fmt: skip
    [benchmark] = json.loads(out.read_text("utf-8"))["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    tokens = benchmark["metrics"]["output_token_count"]["successful"]["mean"]
    fine = totals["successful"] == REQUESTS and totals["errored"] == 0 and abs(tokens - 8) < 0.01
    return {"fine": fine, "requests": totals, "output tokens, mean": tokens}


# aiperf


def aiperf(programs: Path, url: str, folder: Path) -> dict[str, Any]:
    """Streams, with usage."""
    call(
        [str(programs / "aiperf"), "profile", "--model", NAME, "--url", url, "--endpoint-type", "completions",
         "--streaming", "--tokenizer", str(MODEL), "--isl", "64", "--osl", "8", "--concurrency", "2",
         "--request-count", str(REQUESTS), "--extra-inputs", "ignore_eos:true", "--no-gpu-telemetry",
         "--no-server-metrics", "--ui-type", "simple", "--output-artifact-dir", str(folder / "aiperf")], folder,
    )  # fmt: skip
    [out] = (folder / "aiperf").rglob("profile_export_aiperf.json")
    found = json.loads(out.read_text("utf-8"))
    count, tokens = found["request_count"]["avg"], found["output_sequence_length"]["avg"]
    errors = found.get("error_summary") or []
    return {"fine": count == REQUESTS and not errors and tokens == 8, "requests": count, "errors": errors,
            "output tokens, mean": tokens}  # fmt: skip


def framework(name: str) -> Callable[[Path, str, Path], dict[str, Any]]:
    """A run of agents.py."""

    def run(programs: Path, url: str, folder: Path) -> dict[str, Any]:
        script = Path(__file__).with_name("agents.py")
        said = call([str(programs / "python"), str(script), name, url], folder, LITELLM_LOCAL_MODEL_COST_MAP="true")
        found = json.loads(next(line for line in said.splitlines() if line.startswith('{"called"')))
        ended = found["agent ended with"] in ("ai", "assistant", "tool")
        fine = bool(found["called"]) and found["streamed alike"] and found["answered"] and ended and found["embeddings"]
        return {"fine": fine and len(found["results"]) == len(found["called"]), **found}

    return run


def llm_tools(programs: Path, url: str, folder: Path) -> dict[str, Any]:
    """`llm -T` with a function of ours, by a model that its own file names."""
    user = folder / "llm"
    user.mkdir()
    model = f"- model_id: weft\n  model_name: {NAME}\n  api_base: {url}/v1\n  supports_tools: true\n"
    (user / "extra-openai-models.yaml").write_text(model, "utf-8")
    functions = "def double(n: int) -> int:\n    'Doubles a number.'\n    return 2 * n\n"
    asked = [str(programs / "llm"), "-m", "weft", "--key", "any", "--functions", functions, "-T", "llm_version", "--td",
             "-o", "temperature", "0", "-o", "max_tokens", "60"]  # fmt: skip
    said = call([*asked, "What is 21 doubled?"], folder, LLM_USER_PATH=str(user))
    plain = call([*asked, "--no-stream", "What is 21 doubled?"], folder, LLM_USER_PATH=str(user))
    return {"fine": bool(said.strip()) and bool(plain.strip()), "said": said.strip()[:200]}


TOOLS = {
    "lm-eval": Tool(("lm-eval[api,hf]==0.4.13",), lm_eval),
    "guidellm": Tool(("guidellm==0.8.0",), guidellm),
    "aiperf": Tool(("aiperf==0.13.0",), aiperf),
    "langchain": Tool(("langchain==1.5.2", "langchain-openai==1.7.4"), framework("langchain"), torch=False),
    "llamaindex": Tool(
        (
            "llama-index-core==0.14.25",
            "llama-index-llms-openai-like==0.8.1",
            "llama-index-embeddings-openai-like==0.4.0",
        ),
        framework("llamaindex"),
        torch=False,
    ),
    "litellm": Tool(("litellm==1.110.2",), framework("litellm"), torch=False),
    "llm": Tool(("llm==0.36",), llm_tools, torch=False),
}


def main() -> None:
    """Installs and runs what is asked for; the exit code is 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / ".clients", help="where environments are kept")
    parser.add_argument("--json", type=Path, help="where the results go")
    asked = parser.parse_args()
    if unknown := [name for name in asked.tools if name not in TOOLS]:
        parser.error(f"{unknown[0]!r} is not known; there are {', '.join(TOOLS)}")
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
    for name in asked.tools or TOOLS:
        tool = TOOLS[name]
        programs = installed(asked.folder.resolve(), name, tool.packages, tool.torch)
        with TemporaryDirectory(prefix="weft-clients-") as folder, serving() as server:
            begin = time.monotonic()
            results[name] = tool.run(programs, server.url, Path(folder)) | {"packages": tool.packages}
        print(f"{name}: {'fine' if results[name]['fine'] else 'NOT FINE'}, {time.monotonic() - begin:.0f} s")
        for key, value in results[name].items():
            if key == "values":
                for line, values in value.items():
                    shown = ", ".join(f"{which} {number:.6g}" for which, number in values.items())
                    print(f"  {line}: {shown}")
            elif key not in ("fine", "packages"):
                print(f"  {key}: {value}")
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    sys.exit(not all(result["fine"] for result in results.values() if isinstance(result, dict)))


if __name__ == "__main__":
    main()
