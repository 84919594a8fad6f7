"""The gRPC server of one rank: its socket, the standard health service and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_proto.transport import SERVER_OPTIONS
from lorax_shard.engine.engine import Engine
from lorax_shard.rpc.errors import ErrorInterceptor
from lorax_shard.rpc.queue import CommandQueue
from lorax_shard.rpc.servicer import LoraxServicer

_SERVICE = pb.DESCRIPTOR.services_by_name["LoraxService"].full_name
# What sockaddr_un holds on Linux, less the closing zero.
_MAX_SOCKET_PATH = 107


class ShardServer:
    """Serves one rank on the address that its configuration names."""

    def __init__(self, config: ShardConfig, engine: Engine, commands: CommandQueue) -> None:
        # The address in use; a port of 0 is replaced by the real one at the start.
        self.uri = config.shard_uris[config.rank]
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(_SERVICE)], options=SERVER_OPTIONS
        )
        pb_grpc.add_LoraxServiceServicer_to_server(  # type: ignore[no-untyped-call]
            LoraxServicer(engine, commands, config), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> None:
        """Listen; StartupError (SOCKET_FAILED) says why that is not possible."""
        if (path := socket_path(self.uri)) is not None:
            await _clear_stale(path)
        try:
            port = self._server.add_insecure_port(self.uri)
        except RuntimeError as error:
            raise _failed(self.uri, "it cannot be bound; is it in use, or not writable?") from error
        if path is None:
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


def socket_path(uri: str) -> Path | None:
    """Return the path of a unix socket's address; None for host:port."""
    if not uri.startswith("unix:"):
        return None
    path = uri.removeprefix("unix:")
    return Path("/" + path.lstrip("/") if path.startswith("//") else path)


async def _clear_stale(path: Path) -> None:
    """Remove the socket of a process that is gone; refuse to take one that is in use."""
    if len(str(path).encode()) > _MAX_SOCKET_PATH:
        raise _failed(path, f"its path is longer than the {_MAX_SOCKET_PATH} bytes of a socket")
    if not path.parent.is_dir():
        raise _failed(path, "its folder does not exist")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise _failed(path, "a file that is no socket has this name")
    with contextlib.suppress(ConnectionError, TimeoutError):
        _, writer = await asyncio.wait_for(asyncio.open_unix_connection(path), 1.0)
        writer.close()
        raise _failed(path, "another process listens there")
    path.unlink(missing_ok=True)


def _failed(where: object, why: str) -> StartupError:
    return StartupError(f"cannot listen on {where}: {why}", ExitCode.SOCKET_FAILED)
