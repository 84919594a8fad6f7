"""The connections that a front was given, and how many of them have ended."""

from __future__ import annotations

from collections.abc import Callable

from lorax_router.http_api.connection import ConnectionLimits, HttpConnection
from lorax_router.http_api.connections import Connections


class HandedConnections(Connections):
    """Connections whose ends are told.

    Args:
        limits: what they may cost.
        tell: called with how many have ended so far, each time one does.
    """

    def __init__(self, limits: ConnectionLimits, tell: Callable[[int], None]) -> None:
        super().__init__(limits)
        self._tell = tell
        self._num_ended = 0

    def remove(self, connection: HttpConnection) -> None:
        """Forget a connection that is closed."""
        if connection in self._open:
            self.end_one()
        super().remove(connection)

    def end_one(self) -> None:
        """Count one that ended; also one that never began."""
        self._num_ended += 1
        self._tell(self._num_ended)
