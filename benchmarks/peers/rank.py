"""One process of transformers under measurement, started by prefill.py; computes a prefill whenever it is told to.

Alone it is the whole model; under torchrun it is one rank of `tp_plan="auto"` over gloo. It is told over a Unix
socket, which network namespaces don't keep apart: a line with the token ids in, a line with the seconds out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main() -> None:
    """Loads, says so, serves until the other end closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--cores", required=True, help="that this process keeps to, one thread on each")
    given = parser.parse_args()
    cores = [int(core) for core in given.cores.split(",")]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    logging.disable_progress_bar()
    split = {"tp_plan": "auto"} if "WORLD_SIZE" in os.environ else {}
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=torch.float32, attn_implementation="sdpa", **split
    ).eval()
    control = socket.socket(socket.AF_UNIX)
    control.connect(given.socket)
    lines = control.makefile("rw")
    print(json.dumps({"ready": True}), file=lines, flush=True)
    for line in lines:
        ids = torch.tensor([json.loads(line)])
        begin = time.perf_counter()
        with torch.inference_mode():
            token = int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        print(json.dumps({"seconds": time.perf_counter() - begin, "token": token}), file=lines, flush=True)


if __name__ == "__main__":
    main()
