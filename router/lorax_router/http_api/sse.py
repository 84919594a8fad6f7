"""Streams tokens as server-sent events, straight to the ASGI connection.

One write per chunk and no model per token: this is the path that every streamed token takes. Once
a stream has begun, its chunks are written as they come from the engine, without a task that wakes
for each, and past the layers of the application, where the server offers that. A
stream that cannot begin is answered with the status of its error; one that takes long to begin,
because it waits for its turn or its adapter, is opened meanwhile, so that nobody on the way takes
the connection for dead. What goes wrong after that comes as one event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Generic, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorax_contract.errors import LoraxError
from lorax_router.http_api.body_parts import BODY_PARTS, BodyParts
from lorax_router.http_api.disconnect import ClientGoneError, while_present
from lorax_router.http_api.responses import public_error
from lorax_router.service.batch import BatchStream
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.generation import AnswerStream

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
_COMMENT = b":\n\n"


Stream = TypeVar("Stream", bound=AnswerStream | BatchStream)
Written_contra = TypeVar("Written_contra", bound=AnswerStream | BatchStream, contravariant=True)


class EventWriter(Protocol[Written_contra]):
    """How a dialect writes one stream; each method returns whole events, or b"" for none."""

    def begin(self, stream: Written_contra) -> bytes:
        """What comes before the first token."""

    def chunk(self, sequence: int, chunk: TokenChunk) -> bytes:
        """What a chunk of a sequence says."""

    def end(self) -> bytes:
        """What comes after the last chunk of the last sequence."""

    def failure(self, error: LoraxError) -> bytes:
        """What ends a stream that has begun and failed."""

    def refusal(self, error: LoraxError) -> Response:
        """The answer of a stream that could not begin."""


class TokenEvents(Response, Generic[Stream]):
    """The response of a streaming route; opens the stream when it is sent, and closes it."""

    def __init__(
        self,
        open_stream: Callable[[], Awaitable[Stream]],
        writer: EventWriter[Stream],
        headers: dict[str, str],
        keep_alive_s: float | None = None,
    ) -> None:
        super().__init__(headers={**headers, "content-type": "text/event-stream"})
        # The length is not known: a body follows in parts.
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._open_stream = open_stream
        self._writer = writer
        self._keep_alive_s = KEEP_ALIVE_S if keep_alive_s is None else keep_alive_s
        self._parts: BodyParts | None = None
        self._has_begun = False
        self._beginning = asyncio.Lock()
        self._sent_at = monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the stream ends or the client leaves."""
        self._parts = scope.get(BODY_PARTS)
        try:
            failure = await while_present(receive, self._send_all(send), self._keep_alive(send))
        except ClientGoneError:
            return
        if failure is not None:
            await self._writer.refusal(failure)(scope, receive, send)

    async def _send_all(self, send: Send) -> LoraxError | None:
        """Send all events; return the error of a stream that could not begin."""
        try:
            last = await self._send_chunks(send)
        except LoraxError as error:
            if not self._has_begun:
                return error
            last = self._writer.failure(public_error(error))
        except Exception:
            logger.exception("unexpected error in a stream")
            unknown = LoraxError(public="")
            if not self._has_begun:
                return unknown
            last = self._writer.failure(unknown)
        await self._send(send, last, is_last=True)
        return None

    async def _send_chunks(self, send: Send) -> bytes:
        """Send all but the last events, which are returned to close the response with."""
        opened = await self._open_stream()
        async with opened as stream:
            writer = self._writer
            events = writer.begin(opened)
            async for sequence, chunk in stream:
                events += writer.chunk(sequence, chunk)
                if stream.is_done:
                    break
                if events:
                    await self._send(send, events)
                    events = b""
                    if self._parts is not None:
                        stream.hand_to(self._write)
        return events + writer.end()

    def _write(self, sequence: int, chunk: TokenChunk) -> None:
        """Write what a chunk says that is not the last one, at once."""
        if events := self._writer.chunk(sequence, chunk):
            assert self._parts is not None
            self._sent_at = monotonic()
            self._parts.write(events)

    async def _send(self, send: Send, body: bytes, *, is_last: bool = False) -> None:
        if not self._has_begun:
            await self._begin(send)
        self._sent_at = monotonic()
        await send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def _begin(self, send: Send) -> None:
        # The first event and a comment may come at the same time, and the head once.
        async with self._beginning:
            if not self._has_begun:
                head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(head)
                self._has_begun = True

    async def _keep_alive(self, send: Send) -> None:
        """Send an empty comment whenever nothing was sent for a while."""
        while True:
            idle_s = monotonic() - self._sent_at
            if idle_s >= self._keep_alive_s:
                await self._send(send, _COMMENT)
                idle_s = 0.0
            await asyncio.sleep(self._keep_alive_s - idle_s)
