"""A worker process: `python -m weft.execute.worker --join ADDRESS`, token in the environment.

Ends with its launcher from the first moment on, and is a rank (rank.py). Knows processes and sockets. No torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import zmq

from weft.execute.process import end_with_launcher
from weft.launch.launcher import LEASE_VARIABLE, TOKEN_VARIABLE
from weft.launch.sockets import worker_socket

PRIMITIVES = 128


def main(arguments: list[str] | None = None) -> int:
    """Joins an engine and serves until it ends."""
    parser = argparse.ArgumentParser(prog="python -m weft.execute.worker", description=__doc__)
    parser.add_argument("--join", required=True, help="the engine's control address, such as tcp://10.0.0.1:9000")
    parser.add_argument("--address", default="127.0.0.1", help="address at which other ranks reach this one")
    parser.add_argument("--port", type=int, default=0, help="port for them; 0: any that is free")
    given = parser.parse_args(arguments)
    token, _, ticket = os.environ.pop(TOKEN_VARIABLE, "").partition(".")
    if not token:
        print(f"{TOKEN_VARIABLE} is not set; it holds the token that the engine printed", file=sys.stderr)
        return 2
    if os.environ.get(LEASE_VARIABLE):
        end_with_launcher()
    # oneDNN keeps what it makes for each number of rows that it meets: up to 0.7 MB of code each time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))
    from weft.execute.rank import Worker  # which takes seconds, and the launcher may end meanwhile

    context = zmq.Context()
    control = worker_socket(context, token)
    control.ipv6 = "[" in given.join
    control.connect(given.join)
    alarm = worker_socket(context, token)
    alarm.ipv6 = control.ipv6
    alarm.connect(given.join)
    path = given.join.removeprefix("ipc://")  # the engine's folder, where it is on this machine
    folder = str(Path(path).parent) if path != given.join else None
    worker = Worker(control, given.address, given.port, folder, alarm, ticket)
    try:
        worker.serve()
    except KeyboardInterrupt:
        return 130
    finally:
        control.close()
    # Not `return`: a collective whose peer is gone may still block the network thread.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
