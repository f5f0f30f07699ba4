"""Errors that a user can do something about. Knows no other room."""

from __future__ import annotations


class InputError(ValueError):
    """Something that the user gave can't be used: one line with what was given, what is allowed, what to do."""


class NoRoom(InputError):
    """The machine of rank `rank` has less memory than its part of the model takes."""

    def __init__(self, line: str, rank: int) -> None:
        super().__init__(line)
        self.rank = rank


class LinkLost(RuntimeError):
    """A rank can't reach another one."""


def told(error: BaseException) -> str:
    """An error with its notes: for terminals, not for clients, who need not know what a process printed last."""
    return "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])


def in_a_line(error: Exception) -> str:
    """An error for whom it concerns; one that is nobody's wish with its kind."""
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, WorkerLost | WorkerFailed | InputError) else f"{type(error).__name__}: {line}"


class WorkerLost(RuntimeError):
    """A rank was killed, stopped or cut off; whatever was under way can be run again."""


class WorkerFailed(RuntimeError):
    """A rank can't do what was asked, or ended by its own fault; what was asked may be why."""


class Interrupted(WorkerFailed):
    """Who waited for workers doesn't want to any more."""


class GivenUp(WorkerFailed):
    """Workers are lost again and again; starting them once more would not help."""


class Busy(RuntimeError):
    """More is asked for than may wait. `retry_after`: seconds after which there should be room."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class RequestFailed(RuntimeError):
    """One request could not be answered to its end, for a reason of its own; no other is concerned."""


class Unavailable(RuntimeError):
    """Nothing can be served now: the model is being loaded, or the server ends, or it has failed."""
