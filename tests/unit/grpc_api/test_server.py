"""gRPC health and reflection of the router."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lorax_contract.errors import LoraxError, UnhealthyError
from lorax_router.grpc_api.server import GrpcServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """The health that the server is told."""

    def __init__(self) -> None:
        self.error: LoraxError | None = None

    async def check(self) -> None:
        if self.error is not None:
            raise self.error


@contextlib.asynccontextmanager
async def served(health: Health) -> AsyncIterator[tuple[GrpcServer, grpc.aio.Channel, int]]:
    server = GrpcServer(health.check, interval_s=0.01)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield server, channel, port
    await server.stop(0)


async def status(channel: grpc.aio.Channel) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status


async def becomes(channel: grpc.aio.Channel, wanted: int) -> None:
    while await status(channel) != wanted:
        await asyncio.sleep(0.01)


def test_health_follows_the_engine():
    async def run() -> None:
        health = Health()
        health.error = UnhealthyError("starting")
        async with served(health) as (server, channel, _):
            assert await status(channel) == NOT_SERVING
            health.error = None
            following = asyncio.create_task(server.follow_health())
            async with asyncio.timeout(5):
                await becomes(channel, SERVING)
                health.error = UnhealthyError("gone")
                await becomes(channel, NOT_SERVING)
            following.cancel()

    asyncio.run(run())


def test_reflection_lists_the_services():
    async def run() -> set[str]:
        async with served(Health()) as (_, channel, _):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            call = stub.ServerReflectionInfo(iter([request]), timeout=5)
            async for reply in call:
                return {each.name for each in reply.list_services_response.service}
            return set()

    assert "grpc.health.v1.Health" in asyncio.run(run())


def test_a_port_that_is_taken_is_an_error():
    async def run() -> None:
        async with served(Health()) as (_, _, port):
            with pytest.raises(OSError, match=str(port)):
                GrpcServer(Health().check).bind("127.0.0.1", port)

    asyncio.run(run())
