"""The process beside a server, which reads the bodies that take long (`python -m weft.server.child MIB`).

Frames come over its standard input and go out over its standard output: a length, then a message. The first one has the
facts, and is answered by an empty one; then every body is answered by what it asks for, or by why it is refused. It
takes at most MIB more memory than it has at the beginning, and ends when its standard input does, whatever it is at.
Without torch, which no tokenizer needs and which would be most of it.

Knows pipes and limits; what a body means is `reading`'s.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

import msgspec

from weft.errors import InputError
from weft.server.asked import Answered, Asked, Facts
from weft.server.reading import Reader, parsed
from weft.server.refused import MISTAKE, Refused
from weft.text import leave_torch_out, tokenizer_of

WIDTH = 4  # bytes of a frame's length
SCHEMA = "schema"


class Job(msgspec.Struct, frozen=True):
    """A body to be read, or the schema of one, to be tried."""

    path: str  # SCHEMA
    body: bytes


class Told(msgspec.Struct, frozen=True, tag=True):
    """Why a body is refused. `last`: this process ends with it."""

    status: int
    message: str
    field: str | None = None
    code: str | None = None
    last: bool = False


Reply = Asked | Answered | Told


def framed(message: bytes) -> bytes:
    """As it goes through a pipe."""
    return len(message).to_bytes(WIDTH, "little") + message


def main() -> None:
    """Until the server ends."""
    most = int(sys.argv[1]) << 20
    leave_torch_out()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed does not get among the frames
    frames: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(frames,), daemon=True).start()
    import transformers  # noqa: F401  # before there is anything to do: it takes most of the start

    facts = msgspec.msgpack.decode(frames.get(), type=Facts)
    reader = Reader(facts, tokenizer_of(Path(facts.path)))
    before = _data_bytes()
    if before:
        _limit(before + most)
    gc.collect()
    gc.freeze()  # looking through what stays would make some requests wait
    _say(out, b"")
    # What one request left behind is not to be the next one's burden: then the server starts another process.
    while _data_bytes() <= before + most // 4:
        told = _told(reader, msgspec.msgpack.decode(frames.get(), type=Job))
        _say(out, _packed(told))
        if isinstance(told, Told) and told.last:
            return
        del told


def _packed(told: Reply) -> bytes:
    try:
        return msgspec.msgpack.encode(told)
    except Exception:  # whatever it is, it is one request's
        traceback.print_exc()
        return msgspec.msgpack.encode(Told(500, MISTAKE))


def _say(out: BinaryIO, message: bytes) -> None:
    out.write(framed(message))
    out.flush()


def _listen(frames: SimpleQueue[bytes]) -> None:
    """On a thread, so that the end of the server is the end of this process too, whatever it is at."""
    while (head := sys.stdin.buffer.read(WIDTH)) and len(head) == WIDTH:
        length = int.from_bytes(head, "little")
        body = sys.stdin.buffer.read(length)
        if len(body) < length:
            break
        frames.put(body)
    os._exit(0)


def _data_bytes() -> int:
    """Bytes that no file backs; 0 where the system doesn't tell."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[5]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _limit(most: int) -> None:
    """Bytes that this process may come to have; where the system knows such limits."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _told(reader: Reader, job: Job) -> Reply:
    try:
        return reader.follow(job.body.decode()) if job.path == SCHEMA else reader.read(parsed(job.path, job.body))
    except Refused as error:
        return Told(error.status, error.message, error.field, error.code)
    except InputError as error:
        return Told(400, str(error))
    except MemoryError:
        return Told(400, "reading this request takes more memory than one may have; send less in one", last=True)
    except Exception:
        traceback.print_exc()
        return Told(500, MISTAKE)


if __name__ == "__main__":
    main()
