"""gRPC health and reflection of the router."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.helpers.grpc_calls import Served, grpc_served, servicer_of
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop

from lorax_contract.errors import UnhealthyError
from lorax_router.grpc_api.health import HealthService
from lorax_router.grpc_api.server import GrpcServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def status(served: Served, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(served.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status


async def becomes(served: Served, wanted: int) -> None:
    while await status(served) != wanted:
        await asyncio.sleep(0.01)


@in_loop
async def test_health_follows_the_engine_under_both_names():
    world = World()
    world.engine.unhealthy = UnhealthyError("starting")
    async with grpc_served(world, interval_s=0.01) as served:
        assert await status(served) == NOT_SERVING
        world.engine.unhealthy = None
        following = asyncio.create_task(served.server.follow_health())
        async with asyncio.timeout(5):
            await becomes(served, SERVING)
            assert await status(served, "lorax.v1.Lorax") == SERVING
            world.engine.unhealthy = UnhealthyError("gone")
            await becomes(served, NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError, match="no such service") as raised:
            await status(served, "lorax.v2")
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        following.cancel()


@in_loop
async def test_a_watch_tells_of_each_change_and_of_the_end():
    world = World()
    async with grpc_served(world, interval_s=0.01) as served:
        stub = health_pb2_grpc.HealthStub(served.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert (await watch.read()).status == SERVING
        await asyncio.gather(served.server.stop(0.1), _reads(watch, NOT_SERVING))


@in_loop
async def test_a_server_that_drains_says_so_at_once_and_stays_so():
    async with grpc_served(World(), interval_s=0.01) as served:
        assert await status(served) == SERVING
        served.server.stop_admitting()
        assert await status(served) == NOT_SERVING
        following = asyncio.create_task(served.server.follow_health())
        await asyncio.sleep(0.05)
        assert await status(served) == NOT_SERVING
        following.cancel()


async def _reads(watch: Any, wanted: int) -> None:
    assert (await watch.read()).status == wanted


class DeafContext:
    """A watcher that reads nothing."""

    def __init__(self) -> None:
        self.written = 0

    async def write(self, _message: object) -> None:
        self.written += 1
        await asyncio.Event().wait()


@in_loop
async def test_a_watcher_that_does_not_read_holds_up_nobody():
    health, deaf = HealthService(frozenset({""})), DeafContext()
    watching = asyncio.create_task(health.Watch(health_pb2.HealthCheckRequest(), deaf))
    while not deaf.written:
        await asyncio.sleep(0)
    health.set(SERVING)
    assert (await health.Check(health_pb2.HealthCheckRequest(), deaf)).status == SERVING
    watching.cancel()


@in_loop
async def test_reflection_tells_services_and_messages():
    """What grpcurl asks for: the services, and the file that a method's messages are in."""
    async with grpc_served(World()) as served:
        ask = reflection_pb2.ServerReflectionRequest
        requests = [ask(list_services=""), ask(file_containing_symbol="lorax.v1.Lorax")]
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        replies = [each async for each in stub.ServerReflectionInfo(iter(requests), timeout=5)]
        names = {each.name for each in replies[0].list_services_response.service}
        assert {"grpc.health.v1.Health", "lorax.v1.Lorax"} <= names
        files = replies[1].file_descriptor_response.file_descriptor_proto
        file = descriptor_pb2.FileDescriptorProto.FromString(files[0])
        assert file.package == "lorax.v1"
        assert "GenerateRequest" in {each.name for each in file.message_type}


@in_loop
async def test_a_port_that_is_taken_is_an_error():
    world = World()
    async with grpc_served(world) as served:
        with pytest.raises(OSError, match=str(served.port)):
            GrpcServer(servicer_of(world)).bind("127.0.0.1", served.port)
