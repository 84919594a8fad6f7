"""One connection: uvicorn's protocol with bounds on what a client may send, hold and wait for.

Everything that a client can make the server keep is bounded here, whatever the application does:

* bytes that are neither part of a body nor a whole head (heads, trailers, chunk extensions),
* time without a head, without progress in a body, without reading what is written,
* bytes that are written and not read: a stream that is that far behind is ended.

Writing never waits for a client. So a generation is over when its last token is there, not when
its client has read it, and what is left to send keeps no place that another request could have.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lorax_contract.errors import BadRequestError, LoraxError, SlowRequestError
from lorax_router.http_api.body_parts import BODY_PARTS, BodyParts
from lorax_router.http_api.json_text import dumps
from lorax_router.http_api.responses import error_document

logger = logging.getLogger(__name__)

# Most bytes outside of bodies that are taken in a row, give or take one read.
MAX_HEAD_BYTES = 65_536
# Seconds that a connection on which nothing is asked stays open when the server ends: a request may
# be on its way, whose client would never hear whether it was computed.
_LAST_HEAD_S = 0.25
# The same where it is the first one, as of who is on a machine whose cores are full.
_FIRST_HEAD_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What clients may cost together and each; times are in seconds."""

    max_connections: int = 4096
    # For a head, and to go on with a body or with reading what was written.
    client_timeout_s: float = 30.0
    # Between requests; longer than most clients keep theirs.
    idle_s: float = 75.0
    # What counts as progress in a body, on average.
    body_bytes_per_s: float = 1_000.0
    # What counts as progress in reading, within `client_timeout_s`.
    read_bytes: int = 4_096
    # Written and not read: of one stream, and of all connections.
    max_unread_bytes: int = 1 << 20
    max_all_unread_bytes: int = 128 << 20


class Phase(enum.Enum):
    """What a connection waits for."""

    # For the first byte of another request.
    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    # For nothing of the client's: a request is being answered.
    ANSWER = enum.auto()


class OpenConnections(Protocol):
    """All connections of a server, as one of them sees the others."""

    limits: ConnectionLimits

    def add(self, connection: HttpConnection) -> None:
        """Take a new connection in."""

    def remove(self, connection: HttpConnection) -> None:
        """Forget a connection that is closed."""

    def note(self, connection: HttpConnection, *, is_waiting: bool) -> None:
        """A connection waits for a head from now on, or has one."""


class HttpConnection(HttpToolsProtocol):
    """uvicorn's protocol with errors in JSON, bounds, and care for pipelines."""

    transport: Any

    def __init__(self, *args: Any, connections: OpenConnections, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._all = connections
        self._limits = connections.limits
        # Bytes received since the last part of a body or the end of a request.
        self._bytes_outside = 0
        # The request that is being answered; the one read last may still wait for its turn.
        self._answering: RequestResponseCycle | None = None
        self._phase = Phase.HEAD
        self._phase_since = self.loop.time()
        self._body_bytes = 0
        # Whether the server ends, and the connection with the next answer.
        self._is_last = False
        # How much the client had read, and when that was last seen to grow.
        self._read_bytes, self._read_at = 0, self._phase_since

    # --- the transport's side -----------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a new connection, if there is room for it."""
        counted = _CountingTransport(transport)
        super().connection_made(counted)  # type: ignore[arg-type]
        counted.set_write_buffer_limits(high=self._limits.max_unread_bytes)
        self._all.add(self)

    def data_received(self, data: bytes) -> None:
        """Take what arrived; the parser would collect heads and trailers without end."""
        self._unset_keepalive_if_required()
        self._bytes_outside += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            logger.info("a connection sent what is no HTTP")
            self.send_400_response("Invalid HTTP request received.")
        if self._bytes_outside > MAX_HEAD_BYTES and not self.transport.is_closing():
            what = (
                "The head of the request" if self._phase is Phase.HEAD else "What frames the body"
            )
            self.send_400_response(f"{what} is too long.")

    def pause_writing(self) -> None:
        """So much was written and not read: a stream ends here, other answers are whole by now."""
        if self._answering is not None and self._answering.chunked_encoding:
            self.cut("its client reads too slowly")

    def resume_writing(self) -> None:
        """Nothing was paused."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that is being answered, too."""
        self._all.remove(self)
        answering = self._answering
        if answering is not None and not answering.response_complete:
            answering.disconnected = True
            answering.message_event.set()
        super().connection_lost(exc)

    # --- the parser's side --------------------------------------------------------

    def on_message_begin(self) -> None:
        """A head begins."""
        if self._phase is not Phase.HEAD:
            self._enter(Phase.HEAD)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; one behind the body would change the request under its reader."""
        if self._phase is Phase.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head has ended."""
        self._body_bytes = 0
        self._enter(Phase.BODY)
        super().on_headers_complete()
        if self._is_last:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._bytes_outside = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has ended; one that asks for another protocol has its body still to come."""
        self._bytes_outside = 0
        if self.parser.should_upgrade():
            return
        self._enter(Phase.ANSWER)
        super().on_message_complete()
        if self.cycle.response_complete and not self.pipeline:
            # It was answered before its body ended.
            self._enter(Phase.IDLE)

    def on_response_complete(self) -> None:
        """A request was answered."""
        super().on_response_complete()
        if self._phase is Phase.ANSWER and self.cycle.response_complete:
            self._enter(Phase.IDLE)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        if self.transport.get_write_buffer_size() > self._limits.max_unread_bytes:
            self.cut("its client asks for more and reads nothing")
            return
        cast("dict[str, object]", cycle.scope)[BODY_PARTS] = BodyParts(cycle)
        super()._start_asgi_task(cycle, app)

    def _enter(self, phase: Phase) -> None:
        self._phase, self._phase_since = phase, self.loop.time()
        self._all.note(self, is_waiting=phase in (Phase.IDLE, Phase.HEAD))

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on with HTTP/1.1 when a client asks for another protocol, as Java's does for h2c.

        The parser takes the body for that protocol, so another one reads it. It reads
        nothing else: the connection closes after this request.
        """
        self.cycle.keep_alive = False
        framing = (b"content-length", b"transfer-encoding")
        head = [b"%s: %s" % pair for pair in self.headers if pair[0] in framing]
        self.parser = httptools.HttpRequestParser(_BodyOf(self))
        self.data_received(b"\r\n".join([b"POST / HTTP/1.1", *head, b"", rest]))

    # --- endings ------------------------------------------------------------------

    @property
    def unread_bytes(self) -> int:
        """Bytes that were written and that the system has not taken, as the client does not read."""
        return int(self.transport.get_write_buffer_size())

    def check(self, now: float) -> None:
        """End the connection if its client keeps it waiting for too long."""
        self._check_reading(now)
        if self.transport.is_closing():
            return
        waited = now - self._phase_since
        if self._phase is Phase.IDLE:
            if self.unread_bytes:
                # It has something to read.
                self._phase_since = now
            elif waited > self._limits.idle_s:
                self.transport.close()
        elif self._phase is not Phase.ANSWER:
            if self.flow.read_paused or self._is_answering_an_earlier_one:
                # It is not the client who keeps this request waiting.
                self._phase_since = now
            elif waited > self._limits.client_timeout_s + self._body_s():
                self._time_out()

    def shutdown(self) -> None:
        """The server ends: answer what is asked, or just being asked, and close."""
        if self._phase in (Phase.IDLE, Phase.HEAD):
            self._is_last = True
            is_new = self._phase is Phase.HEAD
            self.loop.call_later(_FIRST_HEAD_S if is_new else _LAST_HEAD_S, self._close_unasked)
        else:
            super().shutdown()

    def _close_unasked(self) -> None:
        if self._phase in (Phase.IDLE, Phase.HEAD) and not self.transport.is_closing():
            self.transport.close()

    def cut(self, why: str) -> None:
        """End the connection at once, and with it the request that is being answered."""
        logger.info("a connection is cut: %s", why)
        self.transport.abort()

    def refuse(self, error: LoraxError) -> None:
        """Answer with an error, whatever was asked, and close."""
        self.transport.write(raw_error(error))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or too long, and close."""
        self.refuse(BadRequestError(msg))

    def _body_s(self) -> float:
        is_body = self._phase is Phase.BODY
        return self._body_bytes / self._limits.body_bytes_per_s if is_body else 0.0

    def _check_reading(self, now: float) -> None:
        unread = self.unread_bytes
        read = self.transport.written - unread
        if not unread or read - self._read_bytes >= self._limits.read_bytes:
            self._read_bytes, self._read_at = read, now
        elif now - self._read_at > self._limits.client_timeout_s:
            self.cut("its client does not read")

    @property
    def _is_answering_an_earlier_one(self) -> bool:
        answering = self._answering
        if answering is None or answering.response_complete:
            return False
        return self._phase is Phase.HEAD or answering is not self.cycle

    def _time_out(self) -> None:
        if self._phase is Phase.HEAD and self._bytes_outside:
            self.refuse(SlowRequestError("the head of the request did not come in time"))
        elif self._phase is Phase.BODY and not self.cycle.response_started:
            self.refuse(SlowRequestError("the body of the request did not come in time"))
        else:
            self.transport.close()


class _BodyOf:
    """Passes a connection the body of a request, but not its head, which it has read."""

    def __init__(self, connection: HttpConnection) -> None:
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete


class _CountingTransport:
    """A transport that counts what is written to it."""

    def __init__(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._write: Callable[[bytes], None] = transport.write  # type: ignore[attr-defined]
        # Asked of each connection every second.
        self.get_write_buffer_size = transport.get_write_buffer_size  # type: ignore[attr-defined]
        self.is_closing = transport.is_closing
        self.written = 0

    def write(self, data: bytes) -> None:
        """Write, and count."""
        self.written += len(data)
        self._write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def raw_error(error: LoraxError) -> bytes:
    """A whole response with an error, for a connection without a request that could have one."""
    kind, body = error.kind, dumps(error_document(error))
    status = HTTPStatus(kind.http_status)
    head = [f"HTTP/1.1 {status.value} {status.phrase}", "content-type: application/json"]
    if kind.retry_after_s is not None:
        head.append(f"retry-after: {kind.retry_after_s}")
    head += ["connection: close", f"content-length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode() + body
