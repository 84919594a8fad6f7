"""The gRPC server of one rank: its socket, the standard health service and reflection."""

from __future__ import annotations

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lorax_contract.config import ShardConfig
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_proto.transport import SERVER_OPTIONS
from lorax_shard.adapters.room import AdapterRoom
from lorax_shard.engine.engine import Engine
from lorax_shard.rpc.address import clear_stale, refused, socket_path
from lorax_shard.rpc.errors import ErrorInterceptor
from lorax_shard.rpc.queue import CommandQueue
from lorax_shard.rpc.servicer import LoraxServicer

_SERVICE = pb.DESCRIPTOR.services_by_name["LoraxService"].full_name


class ShardServer:
    """Serves one rank on the address that its configuration names."""

    def __init__(
        self,
        config: ShardConfig,
        engine: Engine,
        commands: CommandQueue,
        room: AdapterRoom | None = None,
    ) -> None:
        # The address in use; a port of 0 is replaced by the real one at the start.
        self.uri = config.shard_uris[config.rank]
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(_SERVICE)], options=SERVER_OPTIONS
        )
        pb_grpc.add_LoraxServiceServicer_to_server(  # type: ignore[no-untyped-call]
            LoraxServicer(engine, commands, config, room), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> None:
        """Listen; StartupError (SOCKET_FAILED) says why that is not possible."""
        clear_stale(self.uri)
        try:
            port = self._server.add_insecure_port(self.uri)
        except RuntimeError as error:
            raise refused(self.uri, "it cannot be bound; is it in use, or not writable?") from error
        if socket_path(self.uri) is None:
            self.uri = f"{self.uri.rpartition(':')[0]}:{port}"
        await self._server.start()
        for service in ("", _SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give those under way some time, and remove the socket."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        if (path := socket_path(self.uri)) is not None:
            path.unlink(missing_ok=True)
