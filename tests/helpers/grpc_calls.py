"""The public gRPC service on a real socket, and clients for it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tests.helpers.http_app import World, server_info
from tests.helpers.inline_templates import InlineTemplates

from lorax_proto.lorax_pb2_grpc import LoraxStub
from lorax_router.grpc_api.limits import CallLimits
from lorax_router.grpc_api.server import GrpcServer
from lorax_router.grpc_api.servicer import PublicServicer
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.prompts.tokenization import Tokenization

# Far above what tests take: where time matters, they say so.
PATIENT = CallLimits(client_timeout_s=10_000.0)


@dataclass
class Served:
    """A server and a client of it."""

    server: GrpcServer
    port: int
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        """The client's stub of the public service."""
        return LoraxStub(self.channel)

    @property
    def address(self) -> str:
        """Where to connect."""
        return f"127.0.0.1:{self.port}"


def servicer_of(world: World) -> PublicServicer:
    """The methods around a world without adapters."""
    return PublicServicer(
        world.service,
        None,  # type: ignore[arg-type]
        SelectionPolicy(),
        world.metrics,
        Tokenization(world.bounds, world.tokenizer, InlineTemplates(world.template)),
        server_info(world.bounds),
    )


@contextlib.asynccontextmanager
async def grpc_served(
    servicer: PublicServicer | World, limits: CallLimits = PATIENT, **settings: Any
) -> AsyncIterator[Served]:
    """Serve on a free port of the loopback; all calls end with the block."""
    if isinstance(servicer, World):
        servicer = servicer_of(servicer)
    server = GrpcServer(servicer, limits, **settings)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    # Tests must not share a connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield Served(server, port, channel)
    finally:
        await server.stop(0)


@dataclass
class Refusal:
    """An error as a client sees it."""

    code: str
    text: str
    reason: str
    field: str = ""
    retry_s: float | None = None
    request_id: str = ""


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    """Read the rich status of an error; a call without one fails the test."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, error
    assert status.message == error.details()
    found = Refusal(error.code().name, status.message, "")
    for detail in status.details:
        _add(found, detail)
    assert found.reason
    return found


def _add(found: Refusal, detail: Any) -> None:
    for kind in (
        error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest,
        error_details_pb2.RequestInfo,
    ):  # fmt: skip
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            break
    match message:
        case error_details_pb2.ErrorInfo():
            assert message.domain == "lorax-py"
            found.reason = message.reason
        case error_details_pb2.RetryInfo():
            found.retry_s = message.retry_delay.ToMilliseconds() / 1000
        case error_details_pb2.BadRequest():
            found.field = message.field_violations[0].field
        case error_details_pb2.RequestInfo():
            found.request_id = message.request_id


async def refused(call: Any) -> Refusal:
    """Return how a call, of one answer or of a stream, was refused."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)
    raise AssertionError("the call was not refused")
