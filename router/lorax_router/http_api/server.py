"""Runs an application on a socket that is already bound: uvicorn without its signals and logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax_router.http_api.connection import ConnectionLimits
from lorax_router.http_api.connections import Connections
from lorax_router.http_api.listeners import refuse_new

logger = logging.getLogger(__name__)

# Seconds that clients get to read their answers after the engine has ended their requests, and
# that the application gets to notice that they are gone.
FLUSH_S = 5.0
_NOTICE_S = 2.0
# And that those get to be accepted who are connected already.
_LAST_ACCEPT_S = 0.05


class HttpServer:
    """Serves one application until stopped; with ``tls`` to clients that speak it.

    Without a ``listener`` it serves the connections that it is given by ``adopt``.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket | None = None,
        limits: ConnectionLimits | None = None,
        flush_s: float = FLUSH_S,
        tls: ssl.SSLContext | None = None,
        connections: Connections | None = None,
    ) -> None:
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        if connections is None:
            connections = Connections(limits or ConnectionLimits())
        self.connections = connections
        config = uvicorn.Config(
            _ending_quietly(app),
            http=connections.new,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=connections.limits.idle_s,  # type: ignore[arg-type]
        )
        self._listeners = [] if listener is None else [listener]
        self._server = _UvicornServer(config, connections, flush_s, tls)

    async def run(self) -> None:
        """Accept connections until ``stop`` is called and the last response is written."""
        await self._server.serve(self._listeners)

    async def wait_started(self) -> None:
        """Return once connections are accepted."""
        await self._server.accepting.wait()

    async def adopt(self, connection: socket.socket) -> bool:
        """Serve a connection that somebody else accepted; False: it ended before it began."""
        return await self._server.adopt(connection)

    def stop(self) -> None:
        """Make ``run`` return: no new connections, and the open ones end with their response."""
        self._server.should_exit = True


class _UvicornServer(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        connections: Connections,
        flush_s: float,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(config)
        self._tls = tls
        self.accepting = asyncio.Event()
        self._connections = connections
        self._flush_s = flush_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        if self._tls is None and sockets:
            await super().startup(sockets)
        else:
            await self._start(sockets or [])
        self.accepting.set()

    async def _start(self, sockets: list[socket.socket]) -> None:
        """As the base class starts, with a bound on how long a client may take to shake hands."""
        await self.lifespan.startup()
        self.servers = [
            await asyncio.get_running_loop().create_server(
                self._new_connection, sock=each, backlog=self.config.backlog, **self._tls_options()
            )
            for each in sockets
        ]
        self.started = True

    async def adopt(self, connection: socket.socket) -> bool:
        """Serve a connection that somebody else accepted; False: it ended before it began."""
        connection.setblocking(False)
        try:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                self._new_connection, connection, **self._tls_options()
            )
        except (OSError, ssl.SSLError) as error:
            logger.debug("a connection ended before it began: %s", error)
            connection.close()
            return False
        return True

    def _new_connection(self) -> asyncio.Protocol:
        return self._connections.new(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )

    def _tls_options(self) -> dict[str, Any]:
        if self._tls is None:
            return {}
        timeout_s = self._connections.limits.client_timeout_s
        return {"ssl": self._tls, "ssl_handshake_timeout": timeout_s}

    async def main_loop(self) -> None:
        """Serve, and watch over the connections, until told to stop."""
        watching = asyncio.create_task(self._connections.watch())
        try:
            await super().main_loop()
        finally:
            watching.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let responses be read for a while; then end connections, and what still answers them."""
        for each in sockets or ():
            refuse_new(each)
        # Whoever is connected by now is accepted, and so is answered.
        await asyncio.sleep(_LAST_ACCEPT_S)
        loop = asyncio.get_running_loop()
        endings = [
            loop.call_later(self._flush_s, self._connections.cut_all),
            loop.call_later(self._flush_s + _NOTICE_S, self._cancel_all),
        ]
        try:
            await super().shutdown(sockets)
        finally:
            for ending in endings:
                ending.cancel()

    def _cancel_all(self) -> None:
        for task in self.server_state.tasks:
            task.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def _ending_quietly(app: ASGIApp) -> ASGIApp:
    """An application whose cancelled requests are no errors: the server ends, nobody is there."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            logger.info("a request to %s was still being answered at the end", scope.get("path"))

    return quiet
