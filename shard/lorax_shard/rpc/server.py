"""The gRPC server of one rank: its socket, the standard health service and reflection."""

from __future__ import annotations

import grpc.aio

from lorax_contract.config import ShardConfig
from lorax_contract.tracing import SpanSink
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_proto.mutual_tls import MutualTls, listen_at
from lorax_proto.transport import SERVER_OPTIONS
from lorax_shard.adapters.rank_adapters import RankAdapters
from lorax_shard.engine.engine import Engine
from lorax_shard.rpc.address import clear_stale, private_sockets, refused, socket_path
from lorax_shard.rpc.errors import ErrorInterceptor
from lorax_shard.rpc.queue import CommandQueue
from lorax_shard.rpc.servicer import LoraxServicer
from lorax_shard.rpc.standard import StandardServices

_SERVICE = pb.DESCRIPTOR.services_by_name["LoraxService"].full_name


class ShardServer:
    """Serves one rank on the address that its configuration names."""

    def __init__(
        self,
        config: ShardConfig,
        engine: Engine,
        commands: CommandQueue,
        rank_adapters: RankAdapters | None = None,
        spans: SpanSink | None = None,
    ) -> None:
        # The address in use; a port of 0 is replaced by the real one at the start.
        self.uri = config.shard_uris[config.rank]
        self._tls = MutualTls.read(config.shard_tls_dir)
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(_SERVICE)], options=SERVER_OPTIONS
        )
        pb_grpc.add_LoraxServiceServicer_to_server(  # type: ignore[no-untyped-call]
            LoraxServicer(engine, commands, config, rank_adapters, spans), self._server
        )
        self._standard = StandardServices(self._server, _SERVICE)

    async def start(self) -> None:
        """Listen; StartupError (SOCKET_FAILED) says why that is not possible."""
        clear_stale(self.uri)
        try:
            with private_sockets():
                port = listen_at(self.uri, self._server, self._tls)
        except RuntimeError as error:
            raise refused(self.uri, "it cannot be bound; is it in use, or not writable?") from error
        if socket_path(self.uri) is None:
            self.uri = f"{self.uri.rpartition(':')[0]}:{port}"
        await self._server.start()
        await self._standard.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give those under way some time, and remove the socket."""
        await self._standard.stop()
        await self._server.stop(grace_s)
        if (path := socket_path(self.uri)) is not None:
            path.unlink(missing_ok=True)
