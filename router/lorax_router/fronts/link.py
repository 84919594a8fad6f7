"""One end of the socket between a front and the core: whole messages, in order, never waited for."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

_LENGTH = struct.Struct("<I")
# Of messages that were sent and that the other end has not read.
MAX_UNSENT_BYTES = 64 << 20

Taker = Callable[[memoryview], None]


class Link(asyncio.Protocol):
    """Hands out each message that arrives, and sends others.

    A message is its length in four bytes and the rest. Whoever is that far behind that too much
    is left to send is given up: the link ends.

    Args:
        take: called with each message; not to be kept beyond the call.
        on_end: called once, when the other end is gone or was given up.
    """

    def __init__(
        self, take: Taker, on_end: Callable[[], None], max_unsent_bytes: int = MAX_UNSENT_BYTES
    ) -> None:
        self._take = take
        self._on_end = on_end
        self._max_unsent = max_unsent_bytes
        self._transport: asyncio.Transport | None = None
        # A message that has not arrived as a whole.
        self._part = bytearray()
        self._needed = 0

    @classmethod
    async def over(
        cls,
        end: socket.socket,
        take: Taker,
        on_end: Callable[[], None],
        max_unsent_bytes: int = MAX_UNSENT_BYTES,
    ) -> Link:
        """Return the link over one end of a pair of sockets, which it owns from now on."""
        _, link = await asyncio.get_running_loop().create_unix_connection(
            lambda: cls(take, on_end, max_unsent_bytes), sock=end
        )
        return link

    def send(self, message: bytes) -> None:
        """Send a message; to an end that is gone it does nothing."""
        if self._transport is not None:
            self._transport.write(_LENGTH.pack(len(message)) + message)

    def close(self) -> None:
        """End the link at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=self._max_unsent)

    def pause_writing(self) -> None:
        """The other end does not read: it is given up."""
        self.close()

    def data_received(self, data: bytes) -> None:
        """Hand out all that is whole."""
        if self._part:
            self._part += data
            if len(self._part) < self._needed:
                return
            data, self._part = bytes(self._part), bytearray()
        view, start, size = memoryview(data), 0, len(data)
        self._needed = _LENGTH.size
        while size - start >= _LENGTH.size:
            end = start + _LENGTH.size + _LENGTH.unpack_from(data, start)[0]
            if end > size:
                self._needed = end - start
                break
            self._take(view[start + _LENGTH.size : end])
            start = end
        self._part += view[start:]

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that it is over."""
        self._transport = None
        self._on_end()
