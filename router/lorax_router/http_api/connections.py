"""All connections of a server: how many there may be, who leaves for whom, who was too slow."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from lorax_contract.errors import OverloadedError
from lorax_router.http_api.connection import ConnectionLimits, HttpConnection

logger = logging.getLogger(__name__)

# Seconds between two looks at all connections.
_LOOK_S = 1.0


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
        """Look at all connections again and again, until cancelled."""
        every_s = min(_LOOK_S, self.limits.client_timeout_s / 4, self.limits.idle_s / 4)
        while True:
            await asyncio.sleep(every_s)
            self.check(asyncio.get_running_loop().time())

    def check(self, now: float) -> None:
        """End what is too slow, and what holds most where all hold too much."""
        for connection in list(self._open):
            connection.check(now)
        held = {each: size for each in self._open if (size := each.unread_bytes)}
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
