"""All connections of a server: how many there may be, who leaves for whom, who was too slow."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Any

from lorax_contract.errors import OverloadedError
from lorax_router.http_api.connection import ConnectionLimits, HttpConnection

logger = logging.getLogger(__name__)

# Seconds between two looks at all connections.
_LOOK_S = 1.0
# How many are looked at before others have their turn: about a millisecond's work.
_AT_ONCE = 250


class Connections:
    """Makes connections, and ends those that cost more than the limits allow."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._open: set[HttpConnection] = set()
        # Those without a whole head, the longest waiting first: they can go without harm.
        self._waiting: dict[HttpConnection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def new(self, *args: Any, **settings: Any) -> HttpConnection:
        """Return the protocol of a new connection, as uvicorn asks for it."""
        return HttpConnection(*args, connections=self, **settings)

    def add(self, connection: HttpConnection) -> None:
        """Take a new connection in; where there is no room, the longest waiting one goes."""
        if len(self._open) >= self.limits.max_connections:
            if longest := next(iter(self._waiting), None):
                longest.cut("others need its place, and it asks for nothing")
                self.remove(longest)
            else:
                connection.refuse(OverloadedError("too many connections", public=""))
        self._open.add(connection)
        self._waiting[connection] = None

    def remove(self, connection: HttpConnection) -> None:
        """Forget a connection that is closed."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def note(self, connection: HttpConnection, *, is_waiting: bool) -> None:
        """A connection waits for a head from now on, or has one."""
        self._waiting.pop(connection, None)
        if is_waiting and connection in self._open:
            self._waiting[connection] = None

    async def watch(self) -> None:
        """Look at all connections again and again, some at a time, until cancelled."""
        every_s = min(_LOOK_S, self.limits.client_timeout_s / 4, self.limits.idle_s / 4)
        while True:
            await asyncio.sleep(every_s)
            connections, unread = list(self._open), []
            for start in range(0, len(connections), _AT_ONCE):
                some = connections[start : start + _AT_ONCE]
                unread += self._checked(some, asyncio.get_running_loop().time())
                await asyncio.sleep(0)
            self._cut_excess(unread)

    def check(self, now: float) -> None:
        """End what is too slow, and what holds most where all hold too much."""
        self._cut_excess(self._checked(list(self._open), now))

    def _checked(self, connections: Iterable[HttpConnection], now: float) -> list[HttpConnection]:
        """End those that are too slow; return those that have something left to read."""
        there = [each for each in connections if each in self._open]
        for connection in there:
            connection.check(now)
        return [each for each in there if each.unread_bytes]

    def _cut_excess(self, connections: Iterable[HttpConnection]) -> None:
        held = {each: each.unread_bytes for each in connections}
        excess = sum(held.values()) - self.limits.max_all_unread_bytes
        for connection in sorted(held, key=held.__getitem__, reverse=True):
            if excess <= 0:
                break
            excess -= held[connection]
            connection.cut("all clients together have too much left to read")

    def cut_all(self) -> None:
        """End all connections at once."""
        if self._open:
            logger.warning("%d connections are cut: their clients did not read", len(self._open))
        for connection in list(self._open):
            with contextlib.suppress(Exception):
                connection.transport.abort()
