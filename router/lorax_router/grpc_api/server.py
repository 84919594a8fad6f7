"""The router's gRPC listener: health and reflection, for probes and for grpcurl."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from lorax_contract.errors import LoraxError

logger = logging.getLogger(__name__)

# Seconds between two looks at the engine's health.
_INTERVAL_S = 2.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class GrpcServer:
    """Serves gRPC on one port; its health service says what ``check_health`` says.

    Args:
        check_health: returns when requests can be served, raises LoraxError otherwise.
        interval_s: seconds between two calls of it.
    """

    def __init__(
        self, check_health: Callable[[], Awaitable[None]], interval_s: float = _INTERVAL_S
    ) -> None:
        self._check_health = check_health
        self._interval_s = interval_s
        # Two listeners on one port would share its calls without a word.
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def bind(self, hostname: str, port: int) -> int:
        """Bind and return the port; raises OSError when it is taken."""
        host = f"[{hostname}]" if ":" in hostname else hostname
        try:
            return self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(str(error)) from error

    async def start(self) -> None:
        """Accept calls, with the health of this moment."""
        await self._update()
        await self._server.start()

    async def follow_health(self) -> None:
        """Keep the health service up to date until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self._update()

    async def stop(self, grace_s: float) -> None:
        """Report that nothing is served any more, then end; open watches get ``grace_s``."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _update(self) -> None:
        try:
            await self._check_health()
        except LoraxError as error:
            logger.warning("not healthy: %s", error)
            await self._health.set("", _NOT_SERVING)
        else:
            await self._health.set("", _SERVING)
