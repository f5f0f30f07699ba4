"""One process of llama.cpp under measurement, started by alone.py in an environment of its own; knows nothing of weft.

    python llama.py MODEL.gguf THREADS

It says what it is in a line, and then answers each line with a prompt's token ids and how many tokens are to follow,
`{"ids": […], "follow": 48}`, with a line of seconds: of the prompt, and of each token after the first.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import xllamacpp


def main() -> None:
    """Loads, says so, serves until the other end closes."""
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.cache_prompt, params.cache_ram_mib = 2048, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
    params.n_batch = params.n_ubatch = 512
    params.verbosity = 0
    server = xllamacpp.Server(params)
    flags = xllamacpp.get_system_info().partition("CPU : ")[2].replace(" = 1", "").strip(" |")
    print(json.dumps({"ready": f"xllamacpp {version('xllamacpp')}, built for {flags}"}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = server.handle_completions(
            {"prompt": asked["ids"], "n_predict": asked["follow"], "ignore_eos": True, "temperature": 0,
             "cache_prompt": False}
        )  # fmt: skip
        timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        each = timings["predicted_ms"] / 1e3 / max(1, timings["predicted_n"])
        print(json.dumps({"prompt": timings["prompt_ms"] / 1e3, "token": each}), flush=True)


if __name__ == "__main__":
    main()
