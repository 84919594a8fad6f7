"""The clients: each sends one request after the other until it is told to stop, and counts."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from tests.acceptance.faults.crowd import Heard, listen
from tests.soak.requests import KEYS, Ask, churned

# Of so many requests one client leaves in the middle of one.
_LEAVES_OF = 12
# And one asks for an adapter that comes and goes.
_CHURNED_OF = 4


@dataclass(slots=True)
class Tally:
    """How all requests ended: each is counted once."""

    sent: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    # Answers that are not what an undisturbed server gives, and errors that nothing explains.
    wrong: list[str] = field(default_factory=list)
    worst_gap_s: float = 0.0

    @property
    def ended(self) -> int:
        """Requests of which the end is known."""
        return sum(self.ends.values())


def kind_of(error: str) -> str:
    """Return an error in one word."""
    if error.startswith(("ConnectError", "ReadError", "RemoteProtocolError", "WriteError")):
        return "cut"
    if error[:3].isdigit():
        return error[:3]
    return "error in the stream"


class Clients:
    """Sends requests to a server.

    Args:
        url: where it is.
        known: requests and their right answers.
        names: adapters that come and go, as they are at a moment.
        explained: kinds of ends that faults of the moment explain, beside ``ok`` and ``left``.
    """

    def __init__(
        self, url: str, known: list[tuple[Ask, Heard]], names: list[str], explained: set[str]
    ) -> None:
        self._url, self._known, self._names = url, known, names
        self.explained = explained
        self.tally = Tally()

    async def run(self, num: int, seed: int, until: float) -> None:
        """Let so many clients ask until a moment of ``perf_counter``; returns when all have ended."""
        limits = httpx.Limits(max_connections=None, keepalive_expiry=5)
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as http:
            await asyncio.gather(
                *(
                    self._client(http, random.Random(f"{seed} {number}"), until)
                    for number in range(num)
                )
            )

    async def _client(self, http: httpx.AsyncClient, draw: random.Random, until: float) -> None:
        while time.perf_counter() < until:
            if self._names and not draw.randrange(_CHURNED_OF):
                await self._ask(http, draw, churned(draw.choice(self._names), draw), None)
            else:
                ask, right = draw.choice(self._known)
                await self._ask(http, draw, ask, right)
            await asyncio.sleep(draw.expovariate(4))

    async def _ask(
        self, http: httpx.AsyncClient, draw: random.Random, ask: Ask, right: Heard | None
    ) -> None:
        self.tally.sent += 1
        headers = {"authorization": f"Bearer {draw.choice(KEYS)}"}
        if not draw.randrange(_LEAVES_OF):
            await self._leave(http, draw, ask.body, headers)
            return
        heard = await listen(http, ask.body, headers)
        self.tally.worst_gap_s = max(self.tally.worst_gap_s, heard.worst_gap_s)
        self._count(ask, heard, right)
        if heard.error:
            # Whoever was turned away comes again after a moment.
            await asyncio.sleep(0.2)

    async def _leave(
        self,
        http: httpx.AsyncClient,
        draw: random.Random,
        body: dict[str, Any],
        headers: dict[str, str],
    ) -> None:
        asking = asyncio.create_task(listen(http, body, headers))
        await asyncio.wait({asking}, timeout=draw.uniform(0.0, 1.0))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        self.tally.ends["left"] += 1

    def _count(self, ask: Ask, heard: Heard, right: Heard | None) -> None:
        if heard.error:
            kind = kind_of(heard.error)
            self.tally.ends[kind] += 1
            # An adapter that is broken, or finds no room, is no fault of the server's own.
            is_expected = kind in self.explained or (ask.is_free and kind != "500")
            if not is_expected:
                self.tally.wrong.append(f"{ask.body}: {heard.error}")
            return
        self.tally.ends["ok"] += 1
        if right is not None and not heard.equals(right):
            self.tally.wrong.append(f"{ask.body}: {heard} instead of {right}")
        if not heard.finishes:
            self.tally.wrong.append(f"{ask.body}: it has no end")
