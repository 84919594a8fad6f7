"""What outlasting losses costs while nothing is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

from tests.acceptance.faults.crowd import converse, requests
from tests.acceptance.faults.server import faulty_server, metric
from tests.acceptance.harness import Result
from tests.helpers.core_world import CoreWorld

from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.service.engine.losses import Losses

# Of the mean decode step.
MOST_SHARE = 0.02
_NUM, _ROUNDS = 2_000, 9


async def _awaiting_s(how: Callable[[asyncio.Task[None]], Any]) -> float:
    """Return the seconds that awaiting one answer takes."""
    begun = time.perf_counter()
    for _ in range(_NUM):
        await how(asyncio.ensure_future(asyncio.sleep(0)))
    return (time.perf_counter() - begun) / _NUM


async def _watching_s() -> float:
    """Return what watching for a hang adds to a step, the median of rounds by turns."""
    scheduler: Any = SimpleNamespace(expected_s=0.02)
    losses = Losses(scheduler, Any, None, time.perf_counter, 30.0, lambda: None)  # type: ignore[arg-type]

    async def plainly(answer: asyncio.Task[None]) -> None:
        await answer

    more = []
    for _ in range(_ROUNDS):
        plain_s = await _awaiting_s(plainly)
        more.append(await _awaiting_s(losses.watched) - plain_s)
    return median(more)


def _core_s() -> float:
    """Return what the scheduler does in a step for requests that were in flight at a loss: there are none."""
    world = CoreWorld(FirstComeFirstServed())
    scheduler = world.scheduler
    isolation, step = scheduler._isolation, SimpleNamespace(rows=[])
    rounds = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        for _ in range(_NUM):
            isolation.compose(None, None, is_clear=True)  # type: ignore[arg-type]
            isolation.acquit(step)  # type: ignore[arg-type]
        rounds.append((time.perf_counter() - begun) / _NUM)
    return median(rounds)


def _step_s() -> float:
    """Return the mean decode step of 8 streams."""
    with faulty_server() as server:
        converse(server.url, requests(8, most=60))
        decode = '"decode"'
        total = metric(server, "lorax_batch_inference_duration_sum", decode)
        return total / metric(server, "lorax_batch_inference_duration_count", decode)


def point_standing() -> Result:
    """Watching each step, and looking for requests that are to be alone."""
    watching_s, core_s = asyncio.run(_watching_s()), _core_s()
    step_s = _step_s()
    share = (watching_s + core_s) / step_s
    figure = (
        f"{1e6 * watching_s:.1f} us to watch a step, {1e6 * core_s:.1f} us in the core, of "
        f"{1e3 * step_s:.1f} ms: {100 * share:.2f} %"
    )
    return Result(share <= MOST_SHARE, figure)
