"""A local HTTP server whose answers a test writes byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

Script = Callable[["Connection"], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Connection:
    """One request, and the way to answer it."""

    def __init__(
        self, head: str, body: dict[str, Any], writer: asyncio.StreamWriter, number: int
    ) -> None:
        self.path = head.split()[1]
        self.head, self.body, self.writer, self.number = head, body, writer, number

    async def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        """Send one chunk of a chunked answer; an empty one is the last."""
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def whole(self, status: str, body: bytes) -> None:
        """Send an answer that is no stream."""
        await self.raw(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (status.encode(), len(body)))
        await self.raw(body)


@contextlib.asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[str]:
    """Serve by the script; yields the URL. The script may be called for several at once."""
    numbers = iter(range(10**6))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = int(head.lower().partition("content-length: ")[2].split()[0])
                body = json.loads(await reader.readexactly(length))
                await script(Connection(head, body, writer, next(numbers)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()


def event(document: dict[str, Any]) -> bytes:
    """Return a document as a server-sent event."""
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def completion(text: str, total: int | None = None) -> bytes:
    """Return an event of a stream of completions."""
    document: dict[str, Any] = {"choices": [{"text": text}]}
    if total is not None:
        document["usage"] = {"prompt_tokens": 3, "completion_tokens": total}
    return event(document)
