"""Parts of a response's body, written past the layers of the application.

None of them changes a part, and to be asked costs each more than writing it does.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# Where a request's scope has them, on a server that offers it.
BODY_PARTS = "lorax.body_parts"


class BodyParts:
    """Writes parts of the body of one response; its head is sent, and its end is still to come."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def write(self, part: bytes) -> None:
        """Write a part of a body whose length was not told, if the client is still there."""
        if not self._cycle.disconnected:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
