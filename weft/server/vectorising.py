"""A request's prompts made vectors: so many at a time as run at once, because a request may have thousands.

Knows the service, and why requests are refused; knows nothing of what becomes of vectors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from weft.batching.params import SamplingParams
from weft.embedding import Vector
from weft.errors import Busy
from weft.server.answers import Usage
from weft.server.client import EngineClient
from weft.server.refused import Refused
from weft.server.ticket import Piece, Ticket, Wishes

AHEAD = 2  # prompts under way for each that can run: the next batch finds its own there
AGAIN_SECONDS = 0.05  # until a full queue is tried again
QUIET_SECONDS = 10.0  # in which nothing need come


class Vectorising:
    """One request's. `usage`: of what has its vector so far."""

    def __init__(self, service: EngineClient, params: SamplingParams, wishes: Wishes) -> None:
        self._service, self._params, self._wishes = service, params, wishes
        self._under_way = 0
        self.usage = Usage()

    async def all(self, prompts: Sequence[list[int]], take: Callable[[int, Vector], None]) -> None:
        """Makes a vector of each, which `take` is told with its number as it comes. Raises what kept one from it; none
        is under way any more then."""
        figures, left = self._service.figures, iter(enumerate(prompts))

        async def some() -> None:
            for number, prompt in left:
                take(number, await self._vector(prompt))

        # So many at once, and not a task for each prompt: starting thousands would halt the loop.
        most = min(len(prompts), AHEAD * (figures.slots if figures is not None else 1))
        tasks = [asyncio.create_task(some()) for _ in range(most)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _vector(self, prompt: list[int]) -> Vector:
        ticket = await self._queued(prompt)
        self._under_way += 1
        try:
            async for piece in ticket.pieces(QUIET_SECONDS):
                if isinstance(piece, Piece) and piece.embedding is not None and piece.finish_reason == "stop":
                    self.usage.add(ticket)
                    return piece.embedding.mean
            raise Refused(
                408, "the time that this request may take is over; send fewer texts in one, or a longer timeout"
            )
        except BaseException:
            self._service.cancel(ticket)
            raise
        finally:
            self._under_way -= 1

    async def _queued(self, prompt: list[int]) -> Ticket:
        """Its ticket. A full queue is waited for while others of this request come to their end."""
        while True:
            try:
                return await self._service.submit(prompt, self._params, self._wishes)
            except Busy:
                if not self._under_way:
                    raise
                await asyncio.sleep(AGAIN_SECONDS)
