"""Runs the application on a socket that is already bound: uvicorn without its signals and logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lorax_contract.errors import BadRequestError
from lorax_router.http_api.encode import dumps, error_document

logger = logging.getLogger(__name__)

# Longest request line and headers together, in bytes, give or take one read.
MAX_HEAD_BYTES = 65_536
# Seconds that a connection may idle between requests; longer than most clients keep theirs.
KEEP_ALIVE_S = 75
# Seconds that responses get to be written after the engine has ended their requests.
FLUSH_S = 5


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with errors in JSON, a bound on heads, and care for pipelines."""

    # Bytes received of a head that has not ended.
    _head_bytes = 0
    _is_in_head = True
    # The request that is being answered; the one read last may still wait for its turn.
    _answering: RequestResponseCycle | None = None

    def data_received(self, data: bytes) -> None:
        """Take what arrived; the parser would collect a head without end."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            logger.info("a connection sent what is no HTTP")
            self.send_400_response("Invalid HTTP request received.")
        self._head_bytes = self._head_bytes + len(data) if self._is_in_head else 0
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_message_complete(self) -> None:
        """A request has ended; one that asks for another protocol has its body still to come."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

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

    def on_message_begin(self) -> None:
        """A head begins."""
        self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head has ended."""
        self._is_in_head = False
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that is being answered, too."""
        answering = self._answering
        if answering is not None and not answering.response_complete:
            answering.disconnected = True
            answering.message_event.set()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or too long, and close."""
        body = dumps(error_document(BadRequestError(msg)))
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)


class _BodyOf:
    """Passes a connection the body of a request, but not its head, which it has read."""

    def __init__(self, protocol: HttpProtocol) -> None:
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete


class HttpServer:
    """Serves one application until stopped."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FLUSH_S,
        )
        self._listener = listener
        self._server = _UvicornServer(config)

    async def run(self) -> None:
        """Accept connections until ``stop`` is called and the last response is written."""
        await self._server.serve([self._listener])

    async def wait_started(self) -> None:
        """Return once connections are accepted."""
        await self._server.accepting.wait()

    def stop(self) -> None:
        """Make ``run`` return: no new connections, and the open ones end with their response."""
        self._server.should_exit = True


class _UvicornServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        self.accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def bind(hostname: str, port: int) -> socket.socket:
    """Return a TCP socket bound to an address, not yet listening; raises OSError."""
    address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    family, kind, protocol, _, where = address
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError:
        listener.close()
        raise
    listener.set_inheritable(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """The address of a bound socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
