"""The router's gRPC listener: the public service, its health, and reflection for grpcurl."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lorax_contract.errors import LoraxError
from lorax_proto.lorax_pb2_grpc import add_LoraxServicer_to_server
from lorax_router.grpc_api import connections
from lorax_router.grpc_api.auth import CertificateSource, KeyInterceptor, credentials_of
from lorax_router.grpc_api.boundary import CallBoundary
from lorax_router.grpc_api.generating import GENERATING, SERVICE, GeneratingServicer
from lorax_router.grpc_api.health import NOT_SERVING, SERVING, HealthService
from lorax_router.grpc_api.limits import CallLimits
from lorax_router.service.keys.store import KeyStore

logger = logging.getLogger(__name__)

# Seconds between two looks at the engine's health.
_INTERVAL_S = 2.0


class GrpcServer:
    """Serves gRPC on one port; its health service says what the inference service says.

    Args:
        servicer: the methods of the public service.
        interval_s: seconds between two looks at the health.
        keys: says who calls; probes ask for none.
        tls: the certificate; None: plain text.
    """

    def __init__(
        self,
        servicer: GeneratingServicer,
        limits: CallLimits | None = None,
        interval_s: float = _INTERVAL_S,
        cut: Callable[[str], object] = connections.cut,
        *,
        keys: KeyStore | None = None,
        tls: CertificateSource | None = None,
    ) -> None:
        limits, keys = limits or CallLimits(), keys or KeyStore()
        self._tls = tls
        self._door = servicer.door
        self._interval_s = interval_s
        self.boundary = CallBoundary(
            SERVICE,
            limits,
            keys=keys,
            check_room=servicer.door.check_room,
            refused=servicer.counts.request_refused,
            counted=GENERATING,
            passed_on=servicer.passed_on,
            cut=cut,
        )
        # What is bound; 0: nothing is yet.
        self.port = 0
        self._server = grpc.aio.server(
            options=limits.server_options(),
            interceptors=[KeyInterceptor(keys, SERVICE), self.boundary],
        )
        self._health = HealthService(frozenset({"", SERVICE}))
        add_LoraxServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def bind(self, hostname: str, port: int) -> int:
        """Bind and return the port; raises OSError when it is taken."""
        address = f"[{hostname}]:{port}" if ":" in hostname else f"{hostname}:{port}"
        try:
            if self._tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials_of(self._tls))
        except RuntimeError as error:
            raise OSError(str(error)) from error
        return self.port

    async def start(self) -> None:
        """Accept calls, with the health of this moment."""
        await self._update()
        await self._server.start()

    async def follow_health(self) -> None:
        """Keep the health service up to date until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self._update()

    def stop_admitting(self) -> None:
        """Report from now on that nothing new is served."""
        self._health.close()

    async def stop(self, grace_s: float) -> None:
        """Report the same, then end; open calls get ``grace_s``."""
        self.stop_admitting()
        await self._server.stop(grace_s)

    async def _update(self) -> None:
        try:
            await self._door.health()
        except LoraxError as error:
            logger.warning("not healthy: %s", error)
            self._health.set(NOT_SERVING)
        else:
            self._health.set(SERVING)
