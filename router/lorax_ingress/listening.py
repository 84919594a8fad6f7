"""The gRPC listener of an ingress, from its first call to its last."""

from __future__ import annotations

import asyncio
import logging
from typing import Self

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_router.grpc_api.server import GrpcServer

logger = logging.getLogger(__name__)

# Between two looks whether calls are answered; for watches of the health, which never end.
_LOOK_S = 0.05
_GRACE_S = 1.0


class GrpcCalls:
    """A listener that follows the health of what it serves.

    Args:
        server: bound and accepting; None: there is no listener.
    """

    def __init__(self, server: GrpcServer | None) -> None:
        self._server = server
        self._following: asyncio.Task[None] | None = None
        if server is not None:
            self._following = asyncio.create_task(server.follow_health())

    @classmethod
    async def start(cls, server: GrpcServer, hostname: str, port: int | None) -> Self:
        """Listen; StartupError where the port cannot be had. Without a port nothing is served."""
        if port is None:
            return cls(None)
        try:
            bound = server.bind(hostname, port)
        except OSError as error:
            raise cannot_listen(hostname, port, str(error)) from error
        await server.start()
        logger.info("gRPC on port %d", bound, extra={"fields": {"event": "grpc", "port": bound}})
        return cls(server)

    async def end(self) -> None:
        """Admit nothing new and return once all calls are answered; watches are ended."""
        if self._server is None or self._following is None:
            return
        self._following.cancel()
        self._server.stop_admitting()
        while self._server.boundary.num_open:  # noqa: ASYNC110 - it counts, and has no event
            await asyncio.sleep(_LOOK_S)
        await self._server.stop(_GRACE_S)


def cannot_listen(hostname: str, port: int, why: str | None) -> StartupError:
    """The words for an address that cannot be had."""
    return StartupError(f"cannot listen on {hostname}:{port}: {why}", ExitCode.BAD_CONFIG)
