"""A client of several servers, which follows what they say of themselves as a balancer does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
from tests.helpers.http_app import events
from tests.helpers.server import Server

# How often health is asked for, and how long one waits who finds nobody ready.
_LOOK_S = 0.1
_WAIT_S = 0.05


class RoundRobin:
    """Sends each request to the next server that says it is ready.

    One that is refused with 503 and the time after which to come back, or whose server takes no
    connections any more, goes to the next one; one that has begun stays where it is.
    """

    def __init__(self) -> None:
        # Whether each server was ready when it was asked last, by its URL.
        self._ready: dict[str, bool] = {}
        self._turns = itertools.count()
        # How often requests were sent on, by what they met.
        self.sent_on = {"draining": 0, "gone": 0}
        self.num_answers: dict[str, int] = {}

    def add(self, url: str) -> None:
        """Send requests there, too, once it is ready."""
        self._ready[url] = False

    def remove(self, url: str) -> None:
        """Send none there any more."""
        del self._ready[url]

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Within, health is asked for all the while."""
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self) -> None:
        async with httpx.AsyncClient(timeout=30) as http:
            while True:
                for url in [*self._ready]:
                    try:
                        is_ready = (await http.get(f"{url}/health")).status_code == 200
                    except httpx.TransportError:
                        is_ready = False
                    if url in self._ready:
                        self._ready[url] = is_ready
                await asyncio.sleep(_LOOK_S)

    async def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """Return the events of one stream from whichever server answers it."""
        while True:
            ready = [url for url, is_ready in self._ready.items() if is_ready]
            if not ready:
                await asyncio.sleep(_WAIT_S)
                continue
            url = ready[next(self._turns) % len(ready)]
            if (text := await self._ask(url, path, body)) is not None:
                self.num_answers[url] = self.num_answers.get(url, 0) + 1
                return events(text)
            if url in self._ready:
                self._ready[url] = False

    async def _ask(self, url: str, path: str, body: dict[str, Any]) -> str | None:
        """Return the text of an answer; None: another server is to be asked."""
        # A connection of its own, as of a new client.
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            try:
                request = http.build_request("POST", path, json=body)
                response = await http.send(request, stream=True)
            except httpx.ConnectError:
                self.sent_on["gone"] += 1
                return None
            async with contextlib.aclosing(response):
                if response.status_code == 503:
                    assert int(response.headers["retry-after"]) > 0
                    self.sent_on["draining"] += 1
                    return None
                assert response.status_code == 200, await response.aread()
                return (await response.aread()).decode()


class RollingRestart:
    """Two servers that are restarted one after the other, and clients who ask all the while.

    Args:
        make: makes a server that is not started.
        bodies: what each client asks for again and again, as a stream.
    """

    def __init__(self, make: Callable[[], Server], bodies: list[dict[str, Any]]) -> None:
        self._make = make
        self._bodies = bodies
        self._stop = asyncio.Event()
        self.balancer = RoundRobin()
        # By client: the events of each stream.
        self.answers: list[list[list[Any]]] = [[] for _ in bodies]
        self.exit_codes: list[int] = []

    async def run(self) -> None:
        """Start, restart and stop; each stream that was begun is read to its end."""
        servers = [*await asyncio.gather(self._start(), self._start())]
        try:
            async with self.balancer.watching(), asyncio.TaskGroup() as group:
                for number in range(len(self._bodies)):
                    group.create_task(self._ask(number))
                for place in range(2):
                    await self._answered_by(servers)
                    servers[place] = await self._restart(servers[place])
                await self._answered_by(servers)
                self._stop.set()
        finally:
            for server in servers:
                await asyncio.to_thread(server.stop)

    async def _start(self) -> Server:
        server = await asyncio.to_thread(self._make().__enter__)
        self.balancer.add(server.url)
        return server

    async def _restart(self, old: Server) -> Server:
        self.exit_codes.append(await asyncio.to_thread(old.stop, signal.SIGTERM))
        self.balancer.remove(old.url)
        return await self._start()

    async def _answered_by(self, servers: list[Server]) -> None:
        """Return once each of them has answered, and so has work."""
        while not {each.url for each in servers} <= set(self.balancer.num_answers):
            await asyncio.sleep(_WAIT_S)

    async def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            found = await self.balancer.stream("/generate_stream", self._bodies[number])
            self.answers[number].append(found)
