"""The command line's form is a promise: a change to it is a change to this list."""

from __future__ import annotations

import typer.main

from weft.cli.main import app

FORM = {
    "bench": [
        "--html", "--json", "--layers", "--link", "--mixed", "--overlap", "--plot", "--pp", "--prompts", "--rounds",
        "--shares", "--threads", "--timeline", "--tokens", "--tp", "--transport", "--weights", "--wire", "model",
    ],
    "bench quality": ["--json", "--kv", "--text", "--threads", "--tokens", "--tp", "--weights", "--wire", "model"],
    "chat": [
        "--api-key", "--dtype", "--kv", "--kv-cache-dtype", "--layers", "--max-tokens", "--overlap",
        "--pipeline-parallel-size", "--pp", "--seed", "--shares", "--system", "--temperature",
        "--tensor-parallel-size", "--threads", "--top-p", "--tp", "--transport", "--url", "--weights", "--wire",
        "model",
    ],
    "doctor": [
        "--calibrations", "--dtype", "--json", "--kv", "--kv-cache-dtype", "--tensor-parallel-size", "--tp",
        "--weights", "model",
    ],
    "generate": [
        "--compare", "--dtype", "--json", "--kv", "--kv-cache-dtype", "--layers", "--layout", "--link", "--max-tokens",
        "--min-p", "--optimise", "--overlap", "--pipeline-parallel-size", "--pp", "--recalibrate",
        "--repetition-penalty", "--reproducible", "--seed", "--shares", "--stop", "--temperature",
        "--tensor-parallel-size", "--threads", "--timeline", "--top-k", "--top-p", "--tp", "--transport",
        "--weights", "--wire", "model", "prompt",
    ],
    "plan": [
        "--catalogue", "--decoding", "--details", "--hardware", "--html", "--json", "--kv", "--kv-cache-dtype",
        "--link",
        "--list", "--overlap", "--price",
        "--prompts", "--shares", "--tokens", "--ttft", "--weights", "--wire", "model",
    ],
    "serve": [
        "--allow-anyone", "--allow-origin", "--api-key", "--check-content", "--client-timeout", "--drain", "--dtype",
        "--host", "--isolate-prefixes", "--join-address", "--kv", "--kv-cache-dtype", "--layers", "--layout", "--link",
        "--local-ranks", "--log-requests", "--log-text",
        "--max-body-bytes", "--max-model-len", "--max-num-batched-tokens", "--max-num-seqs", "--max-waiting",
        "--optimise", "--overlap", "--pipeline-parallel-size", "--plain-data", "--port", "--pp", "--prefix-caching",
        "--rank-ports", "--recalibrate", "--replicas", "--reproducible",
        "--request-timeout", "--served-model-name", "--shares", "--tensor-parallel-size", "--threads",
        "--token-interval", "--tp", "--transport", "--weights", "--wire", "model",
    ],
    "timeline": ["--out", "--width", "files"],
    "worker": ["--address", "--join", "--rank-port", "model"],
}  # fmt: skip


def test_form() -> None:
    group = typer.main.get_command(app)
    form = {
        name: sorted(
            option for parameter in command.params for option in parameter.opts if option not in ("-h", "--help")
        )
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert form == FORM
