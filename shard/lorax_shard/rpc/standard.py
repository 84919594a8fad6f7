"""The standard gRPC services beside a rank's own: health and reflection, for people and probes.

The router needs neither. Where their packages are missing, as on a bare GPU machine that only
measures, the shard serves without them and says so.
"""

from __future__ import annotations

import logging
from typing import Any

import grpc.aio

logger = logging.getLogger(__name__)


class StandardServices:
    """Adds health and reflection to a server that is not started yet."""

    def __init__(self, server: grpc.aio.Server, service: str) -> None:
        self._service = service
        self._health: Any = None
        try:
            from grpc_health.v1 import health, health_pb2_grpc
            from grpc_reflection.v1alpha import reflection
        except ImportError as error:
            logger.warning("no gRPC health and reflection: %s", error)
            return
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (service, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )

    async def start(self) -> None:
        """Say that the rank serves."""
        if self._health is None:
            return
        from grpc_health.v1 import health_pb2

        for service in ("", self._service):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Say that the rank stops."""
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
