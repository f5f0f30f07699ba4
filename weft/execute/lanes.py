"""The lanes of a rank: the only owner of threads (and, for devices that have them, of streams and events).

The thread that walks a program is the compute lane; collectives run on their lanes in the order in which they were
submitted. Knows callables; knows nothing of tensors or steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Protocol


class Pending(Protocol):
    """A collective on its way."""

    def wait(self) -> None:
        """Returns when it has ended; raises what it raised."""
        ...


class Lanes(Protocol):
    """What the executor needs of a device. On a GPU a lane is a stream, and waiting records an event."""

    def submit(self, lane: str, work: Callable[[], None], urgent: bool) -> Pending:
        """Issues `work` on a lane. `urgent`: the compute lane's next step waits for it."""
        ...

    def close(self) -> None:
        """Ends the lanes; what was submitted is finished first."""
        ...


class _Task:
    """One piece of network work, run by whichever thread takes it."""

    __slots__ = ("_done", "_error", "_work")

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._error: BaseException | None = None
        self._done = threading.Lock()  # held until done: the cheapest event that Python has
        self._done.acquire()

    def run(self, ended: Callable[[], None] = lambda: None) -> None:
        """`ended` is called before whoever waits goes on."""
        # Let go of the work with the partial that it holds: whoever keeps the task for its end alone (the run, which
        # the work knows) would else keep every partial of the pass, in a cycle, until some garbage collection.
        work, self._work = self._work, None
        assert work is not None, "a task runs once"
        try:
            work()
        except BaseException as error:  # kept for the compute lane, which waits for it
            self._error = error
        finally:
            ended()
            self._done.release()

    def wait(self) -> None:
        with self._done:
            if self._error is not None:
                raise self._error


class _Thread:
    """One lane that communicates."""

    def __init__(self, name: str, context: Callable[[], AbstractContextManager[object]]) -> None:
        self._context = context
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        self.processor = 0.0  # seconds, until its last task ended
        self._last: _Task | None = None
        self._thread = threading.Thread(target=self._run, name=f"weft-{name}-lane", daemon=True)
        self._thread.start()

    def submit(self, task: _Task, urgent: bool) -> None:
        if urgent and (self._last is None or not self._last._done.locked()):
            task.run()
        else:
            self._queue.put(task)
        self._last = task

    def _run(self) -> None:
        with self._context():
            while (task := self._queue.get()) is not None:
                task.run(self._ended)

    def _ended(self) -> None:
        self.processor = time.thread_time()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=10)


class ThreadLanes:
    """Lanes of a CPU rank: the caller's thread, and one for each lane that communicates, which runs all its work inside
    `context()`."""

    def __init__(self, context: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._context = context
        self._threads: dict[str, _Thread] = {}

    def submit(self, lane: str, work: Callable[[], None], urgent: bool) -> Pending:
        """Runs urgent work at once, on the caller's thread, if the lane is idle: that saves two switches."""
        task = _Task(work)
        if lane not in self._threads:
            self._threads[lane] = _Thread(lane, self._context)
        self._threads[lane].submit(task, urgent)
        return task

    @property
    def processor(self) -> float:
        """Processor seconds that the lanes' own threads have taken so far, when nothing is under way."""
        return sum(thread.processor for thread in self._threads.values())

    def close(self) -> None:
        """Ends the threads after what is queued."""
        for thread in self._threads.values():
            thread.close()
