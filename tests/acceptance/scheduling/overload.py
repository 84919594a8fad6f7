"""Floods, and clients that have no time: who is refused, in which words, and who is not.

``python -m tests.acceptance.scheduling.overload`` runs these points alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
from tests.acceptance.harness import Point, Result, run_points
from tests.helpers.http_app import serving
from tests.helpers.tenants import bearer, key_of, tenant_world

# Of the shard that stands in for a model: so long a step, so many rows.
_STEP_S, _ROWS, _TOKENS = 0.02, 2, 5
# What a tenant may have waiting, and how many of its clients come at once.
_QUEUED, _CLIENTS = 24, 48
# Who obeys `Retry-After` is served after so much of it at most, its own turn included.
MOST_WAITED = 3.0
# Of what clients give their requests, so much may have passed in the median when they hear that
# it is too little.
EARLY = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got, and when."""

    status: int
    seconds: float
    retry_after_s: float
    error: str


class Site:
    """A server with keys, over sockets."""

    def __init__(self, client: httpx.AsyncClient, num_waiting: Callable[[], int]) -> None:
        self._client = client
        self._num_waiting = num_waiting

    async def waiting_at_least(self, number: int) -> None:
        """Return once so many requests wait."""
        while self._num_waiting() < number:
            await asyncio.sleep(_STEP_S)

    async def ask(
        self, tenant: str, tokens: int = _TOKENS, timeout_s: float | None = None
    ) -> Answer:
        """Ask once, and wait for the whole answer."""
        headers = bearer(key_of(tenant))
        if timeout_s is not None:
            headers["x-request-timeout"] = str(timeout_s)
        body = {"inputs": "w1 w2", "parameters": {"max_new_tokens": tokens}}
        started = perf_counter()
        answer = await self._client.post("/generate", json=body, headers=headers)
        error = "" if answer.status_code == 200 else answer.json()["error"]
        waits = float(answer.headers.get("retry-after", 0.0))
        return Answer(answer.status_code, perf_counter() - started, waits, error)

    async def obey(self, tenant: str) -> list[Answer]:
        """Ask until there is an answer, each time after as long as was said."""
        answers = [await self.ask(tenant)]
        while answers[-1].status in (429, 503):
            await asyncio.sleep(answers[-1].retry_after_s)
            answers.append(await self.ask(tenant))
        return answers


@contextlib.asynccontextmanager
async def _site(tenants: dict[str, dict[str, Any]], **config: Any) -> AsyncIterator[Site]:
    with tempfile.TemporaryDirectory() as folder:
        async with tenant_world(Path(folder), tenants, max_batch_size=_ROWS, **config) as (
            world,
            _,
        ):
            world.shard.step_delay_s = _STEP_S
            limits = httpx.Limits(max_connections=500)
            async with (
                serving(world.parts.app) as (url, _),
                httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client,
            ):
                yield Site(client, lambda: world.parts.engine.stats().num_waiting)
                await world.parts.service.wait_idle()


async def _warm(site: Site, tenant: str) -> None:
    """Let the server learn how fast it is."""
    for _ in range(3):
        await asyncio.gather(*(site.ask(tenant) for _ in range(_QUEUED // 2)))


async def _obedient_flood() -> Result:
    """Twice as many clients as may wait: each is refused with a time, and served when it obeys."""
    async with _site({"ant": {"queued_requests": _QUEUED}}) as site:
        await _warm(site, "ant")
        all_answers = await asyncio.gather(*(site.obey("ant") for _ in range(_CLIENTS)))
    refused = [answers for answers in all_answers if len(answers) > 1]
    told = [sum(each.retry_after_s for each in answers[:-1]) for answers in refused]
    took = [sum(each.seconds for each in answers) + wait for answers, wait in zip(refused, told)]
    most = max((took_s / wait for took_s, wait in zip(took, told)), default=0.0)
    statuses = Counter(each.status for answers in all_answers for each in answers)
    rounds = max(len(answers) - 1 for answers in all_answers)
    figure = (
        f"{len(refused)} of {_CLIENTS} refused, told {min(told, default=0):g} to "
        f"{max(told, default=0):g} s, asked again {rounds}x at most, served after {most:.2f} of it"
    )
    ok = set(statuses) <= {200, 429} and bool(refused) and most <= MOST_WAITED
    return Result(ok and min(told) >= 1, f"{figure}; statuses {dict(statuses)}")


async def _others_are_served() -> Result:
    """A tenant that floods without a pause is refused; another's requests never are."""
    tenants = {"ant": {"queued_requests": _QUEUED}, "bee": {"queued_requests": _QUEUED}}
    async with _site(tenants) as site:
        solo = [(await site.ask("bee")).seconds for _ in range(10)]
        flood = [asyncio.ensure_future(site.ask("ant")) for _ in range(200)]
        beside = [await site.ask("bee") for _ in range(20)]
        refused = Counter(each.status for each in await asyncio.gather(*flood))
    slower = statistics.median(each.seconds for each in beside) / statistics.median(solo)
    figure = f"flood {dict(refused)}; the other {len(beside)} served, {slower:.1f}x its solo time"
    ok = refused[429] > 0 and refused[429] + refused[200] == 200
    return Result(ok and all(each.status == 200 for each in beside) and slower <= 4.0, figure)


async def _all_are_too_many() -> Result:
    """Several tenants within their own limits, together too many: 503 and when to come back."""
    tenants = {name: {"queued_requests": _QUEUED} for name in ("ant", "bee", "cat")}
    async with _site(tenants, max_queued_requests=_QUEUED) as site:
        asked = [site.ask(name) for _ in range(_QUEUED // 2) for name in tenants]
        answers = await asyncio.gather(*asked)
    busy = [each for each in answers if each.status == 503]
    statuses = Counter(each.status for each in answers)
    ok = set(statuses) == {200, 503} and all(1 <= each.retry_after_s <= 60 for each in busy)
    return Result(ok, f"{dict(statuses)}: {busy[0].error if busy else 'none refused'}")


async def _too_late() -> Result:
    """Pairs of requests, one with too little time or enough, behind a queue that grows.

    The one without tells how long the other would have waited: who is rejected early must be
    one that could not have been in time.
    """
    async with _site({"ant": {"queued_requests": 500}}, max_concurrent_requests=600) as site:
        await _warm(site, "ant")
        queue = [asyncio.ensure_future(site.ask("ant")) for _ in range(80)]
        await site.waiting_at_least(50)
        pairs = []
        for number in range(24):
            seconds = (0.3, 0.6, 1.2, 2.4, 4.8, 60.0)[number % 6]
            # One after another: a client that shares the machine must not wait for itself.
            await asyncio.sleep(_STEP_S)
            twin = asyncio.ensure_future(site.ask("ant"))
            pairs.append((seconds, twin, asyncio.ensure_future(site.ask("ant", timeout_s=seconds))))
        await asyncio.gather(*queue)
        found = [(seconds, await twin, await own) for seconds, twin, own in pairs]
    # By the words: how soon a client has read them depends on how busy its machine is.
    early = [each for each in found if "first token is at least" in each[2].error]
    wrong = [each for each in early if each[1].seconds <= each[0]]
    late = [each for each in found if each[1].seconds > each[0]]
    passed = statistics.median([own.seconds / limit for limit, _, own in early] or [1.0])
    statuses = Counter(own.status for _, _, own in found)
    figure = (
        f"{len(late)} of {len(found)} would have been too late, {len(early)} heard so early, in "
        f"the median after {passed:.0%} of their time, {len(wrong)} of them wrongly; statuses {dict(statuses)}"
    )
    ok = (
        passed <= EARLY
        and not wrong
        and len(early) >= len(late) / 2
        and set(statuses) <= {200, 504}
    )
    return Result(ok, figure)


async def _running_too_long() -> Result:
    """A request that runs when its time is over ends then, and its row is free."""
    async with _site({"ant": {}}) as site:
        started = perf_counter()
        answer = await site.ask("ant", tokens=150, timeout_s=0.5)
        ended = perf_counter() - started
        after = await site.ask("ant")
    figure = f"{answer.status} after {ended:.2f} s of 0.5 ({answer.error})"
    # Whole it takes 3 s.
    return Result(answer.status == 504 and 0.4 < ended < 2.0 and after.status == 200, figure)


def _point(number: str, title: str, scene: Any) -> Point:
    def check() -> Result:
        work: Coroutine[Any, Any, Result] = scene()
        return asyncio.run(work)

    return Point(number, title, check)


POINTS = [
    _point("U1", "a flooding tenant: who obeys Retry-After is served", _obedient_flood),
    _point(
        "U2", "a flooding tenant: others are not refused, and not slowed down", _others_are_served
    ),
    _point("U3", "too much of all tenants together: 503 with Retry-After", _all_are_too_many),
    _point("U4", "who would be too late hears so early, and nobody else", _too_late),
    _point("U5", "what runs too long ends at its deadline", _running_too_long),
]

if __name__ == "__main__":
    sys.exit(run_points(POINTS, set(sys.argv[1:])))
