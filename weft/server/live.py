"""What the page shows of the last seconds, as JSON. Knows the service; knows nothing of HTTP."""

from __future__ import annotations

import time
from typing import Any

from weft.server.client import EngineClient
from weft.timeline.svg import svg


def live(service: EngineClient, name: str, seen: int = -1) -> dict[str, Any]:
    """State, queues, speeds and the last batch that was recorded; asks for one more to be recorded.

    `known`: the number of a batch whose picture need not be sent again.
    """
    state: dict[str, Any] = {
        "model": name, "status": service.state, "reason": service.reason, "loaded": service.loaded,
        "running": service.running, "waiting": service.waiting, "tokens_per_second": service.live.rate(),
        "time_to_first_token": service.live.to_first(), "time": time.time(),
    }  # fmt: skip
    figures, drawn = service.figures, service.live.drawn
    if figures is None:
        return state
    service.live.wanted = True
    state |= {
        "restarts": figures.restarts, "ranks": figures.ranks, "slots": figures.slots, "memory": figures.memory,
        "reused": figures.reused / figures.looked_up if figures.looked_up else 0.0,
    }  # fmt: skip
    if drawn is not None and drawn.result.timeline is not None:
        batch = drawn.scheduled.batch
        state["batch"] = {
            "tokens": batch.tokens, "sequences": len(batch.segments), "seconds": drawn.run,
            "plan": drawn.plan.describe(), "number": service.live.number,
        }  # fmt: skip
        if service.live.number != seen:
            state["batch"]["svg"] = svg([drawn.result.timeline])
    return state
