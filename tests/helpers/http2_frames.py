"""A client that speaks HTTP/2 by hand: whatever it is told, frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_HEADERS = 4
ENHANCE_YOUR_CALM = 0xB


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """A frame as it is on the wire."""
    size = struct.pack(">I", len(payload))[1:]
    return size + struct.pack(">BBI", kind, flags, stream) + payload


def asked(stream: int, name: str, message: bytes) -> bytes:
    """A call with its whole request."""
    payload = b"\x00" + struct.pack(">I", len(message)) + message
    end_stream = 1
    return opening(stream, f"/lorax.v1.Lorax/{name}") + frame(DATA, payload, end_stream, stream)


def literal(name: str, value: str) -> bytes:
    """A header that no table has."""
    parts = [name.encode(), value.encode()]
    return b"\x00" + b"".join(bytes([len(part)]) + part for part in parts)


def opening(stream: int, path: str) -> bytes:
    """The head of a call whose request has not come yet."""
    head = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x",
            "te": "trailers", "content-type": "application/grpc"}  # fmt: skip
    block = b"".join(literal(name, value) for name, value in head.items())
    return frame(HEADERS, block, END_HEADERS, stream)


class RawClient:
    """A connection that sends frames as it is told, and reads when it is asked to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, *frames: bytes) -> None:
        """Put frames on their way."""
        self._writer.write(b"".join(frames))

    @property
    def is_closed(self) -> bool:
        """Whether the server has ended the connection, as far as writing shows."""
        return self._writer.transport.is_closing()

    async def drained(self) -> None:
        """Return when the server has taken most of what was sent."""
        await self._writer.drain()

    async def frame(self) -> tuple[int, bytes]:
        """The next frame's kind and payload; IncompleteReadError at the end."""
        head = await self._reader.readexactly(9)
        size = int.from_bytes(head[:3])
        return head[3], await self._reader.readexactly(size)

    async def kinds_to_the_end(self) -> list[tuple[int, bytes]]:
        """All frames until the server closes."""
        found = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                found.append(await self.frame())
        return found


@contextlib.asynccontextmanager
async def raw_client(
    port: int, *, greets: bool = True, window: int = 65_535
) -> AsyncIterator[RawClient]:
    """A client of a port of this machine; ``window``: what it lets a server send in a stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = RawClient(reader, writer)
    if greets:
        initial_window_size = 4
        client.send(PREFACE, frame(SETTINGS, struct.pack(">HI", initial_window_size, window)))
    try:
        yield client
    finally:
        writer.close()
