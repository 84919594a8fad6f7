"""Until when the client of a request waits for its answer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from time import perf_counter

from lorax_contract.errors import DeadlineError
from lorax_router.service.records import RequestRecord
from lorax_router.service.validation import CheckedRequest


def deadline_of(checked: CheckedRequest, record: RequestRecord) -> float:
    """Return when a request's last token is to be there, on the clock of the engine loop."""
    seconds = checked.request.parameters.timeout_s
    return math.inf if seconds is None else record.received_at + seconds


def within(deadline: float) -> AbstractAsyncContextManager[None]:
    """Within, DeadlineError ends what lasts longer."""
    return nullcontext() if deadline == math.inf else _within(deadline)


@asynccontextmanager
async def _within(deadline: float) -> AsyncIterator[None]:
    waiting = asyncio.timeout(deadline - perf_counter())
    try:
        async with waiting:
            yield
    except TimeoutError:
        if not waiting.expired():
            raise
        raise DeadlineError("the time that the client gave it is over") from None
