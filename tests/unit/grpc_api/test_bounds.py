"""Calls that end early, and clients that do not read, do not send or ask too much: all bounded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from tests.helpers.grpc_calls import Served, grpc_served, refused
from tests.helpers.http_app import World, limits, until
from tests.helpers.in_loop import in_loop
from tests.helpers.scripted_engine import ScriptedEngine, words

from lorax_contract.step import RequestSpec
from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub
from lorax_router.grpc_api.limits import CallLimits
from lorax_router.service.engine.port import TokenChunk


def changed(**values: Any) -> CallLimits:
    return CallLimits(**{"client_timeout_s": 10_000.0, **values})


def endless(spec: RequestSpec) -> Iterator[TokenChunk]:
    while True:
        yield next(words(" w", " w", num_alternatives=256))


def verbose(num: int) -> ScriptedEngine:
    """An engine whose tokens are 6 kB of messages each."""
    return ScriptedEngine(lambda spec: words(*(f" w{i}" for i in range(num)), num_alternatives=256))


def world_of(engine: ScriptedEngine, **settings: Any) -> World:
    return World(engine=engine, bounds=limits(max_total_tokens=10**6), **settings)


def request(text: str = "w1", **params: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, parameters=pb.Parameters(num_alternatives=256, **params))


@contextlib.asynccontextmanager
async def narrow_client(served: Served) -> AsyncIterator[Any]:
    """A client with a connection of its own and a window that never grows."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 65_535),
        ("grpc.max_receive_message_length", -1),
    ]
    async with grpc.aio.insecure_channel(served.address, options=options) as channel:
        yield LoraxStub(channel)


# --- calls that end early ---------------------------------------------------------


@pytest.mark.parametrize("name", ["Generate", "GenerateStream"])
def test_a_cancelled_call_ends_its_generation(name):
    @in_loop
    async def scene():
        world = World()
        world.engine.open.clear()
        async with grpc_served(world) as served:
            call = getattr(served.stub, name)(request())
            waiting = asyncio.ensure_future(refusing(call))
            await until(lambda: world.engine.submitted)
            call.cancel()
            await until(lambda: world.engine.cancelled == [1])
            await world.service.wait_idle()
            assert world.metric("lorax_request_failure_total", err="dropped") == 1
            await waiting

    scene()


async def finished(call: Any) -> None:
    """Read a call to its end."""
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


async def refusing(call: Any) -> None:
    """Read a call to its end, whatever that is."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        await finished(call)


@pytest.mark.parametrize("name", ["Generate", "GenerateStream"])
def test_a_deadline_that_passes_ends_the_generation(name):
    @in_loop
    async def scene():
        world = World()
        world.engine.open.clear()
        async with grpc_served(world) as served:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await finished(getattr(served.stub, name)(request(), timeout=0.3))
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: world.engine.cancelled == [1])
            await world.service.wait_idle()

    scene()


@in_loop
async def test_a_connection_that_is_lost_ends_its_generations():
    world = World()
    world.engine.open.clear()
    async with grpc_served(world) as served:
        async with narrow_client(served) as stub:
            calls = [stub.GenerateStream(request()) for _ in range(3)]
            reading = [asyncio.ensure_future(refusing(call)) for call in calls]
            await until(lambda: len(world.engine.submitted) == 3)
        await until(lambda: sorted(world.engine.cancelled) == [1, 2, 3])
        await asyncio.gather(*reading, return_exceptions=True)


# --- clients that do not read -----------------------------------------------------


@in_loop
async def test_a_place_is_free_when_the_generation_ends_not_when_its_client_has_read_it():
    world = world_of(verbose(400), max_concurrent_requests=4)
    async with (
        grpc_served(world, changed(max_unread_bytes=64 << 20)) as served,
        narrow_client(served) as stub,
    ):
        calls = [stub.GenerateStream(request()) for _ in range(4)]
        await until(lambda: len(world.engine.submitted) == 4, 30)
        await asyncio.wait_for(world.service.wait_idle(), 30)
        assert world.metric("lorax_request_success_total") == 4
        assert served.server.boundary.unread.total > 1 << 20
        assert (await served.stub.Generate(request(max_new_tokens=1), timeout=30)).sequences
        # Nothing is lost for who reads in the end, and then nothing is left.
        texts = [[chunk.text async for chunk in call] for call in calls]
        assert [text[-1] for text in texts] == [" w399"] * 4
        await until(lambda: served.server.boundary.unread.total == 0)


@in_loop
async def test_a_stream_that_is_too_far_behind_is_ended_and_its_row_with_it():
    world = world_of(ScriptedEngine(endless), max_concurrent_requests=2)
    async with (
        grpc_served(world, changed(max_unread_bytes=1 << 18)) as served,
        narrow_client(served) as stub,
    ):
        calls = [stub.GenerateStream(request()) for _ in range(2)]
        await until(lambda: sorted(world.engine.cancelled) == [1, 2], 30)
        await world.service.wait_idle()
        assert world.metric("lorax_request_failure_total", err="dropped") == 2
        # What waited is gone, whether or not the client goes on.
        await until(lambda: served.server.boundary.unread.total < 1 << 17)
        assert (await served.stub.Info(pb.InfoRequest(), timeout=30)).version
        for call in calls:
            found = await refused(call)
            assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "SLOW_READER")


@in_loop
async def test_a_client_that_stops_reading_is_not_waited_for():
    world = world_of(verbose(400))
    bounds = changed(client_timeout_s=0.5, max_unread_bytes=64 << 20)
    async with grpc_served(world, bounds) as served, narrow_client(served) as stub:
        call = stub.GenerateStream(request())
        await until(lambda: world.engine.submitted, 30)
        await world.service.wait_idle()
        # The message that is being written stays until the client goes on or leaves.
        boundary = served.server.boundary
        await until(lambda: 0 < boundary.unread.total < 20_000, 30)
        assert (await refused(call)).reason == "SLOW_READER"
        await until(lambda: boundary.num_open == 0)
        assert boundary.unread.total == 0


@in_loop
async def test_a_client_that_reads_slowly_and_steadily_gets_everything():
    world = world_of(verbose(300))
    bounds = changed(client_timeout_s=5.0, max_unread_bytes=64 << 20)
    async with grpc_served(world, bounds) as served, narrow_client(served) as stub:
        texts = []
        async for chunk in stub.GenerateStream(request()):
            texts.append(chunk.text)
            await asyncio.sleep(0)
        assert len(texts) == 300


@in_loop
async def test_all_clients_together_have_a_bound_and_the_largest_goes():
    world = world_of(ScriptedEngine(endless), max_concurrent_requests=8)
    bounds = changed(max_unread_bytes=64 << 20, max_all_unread_bytes=8 << 20)
    async with (
        grpc_served(world, bounds) as served,
        narrow_client(served) as greedy,
        narrow_client(served) as modest,
    ):
        modest_call = modest.GenerateStream(pb.GenerateRequest(text="w1"))
        assert await modest_call.read()
        calls = [greedy.GenerateStream(request()) for _ in range(3)]
        peak = 0
        while len(world.engine.cancelled) < 3:
            assert await modest_call.read()
            peak = max(peak, served.server.boundary.unread.total)
        # The connection that held most was cut, whatever its client does; the other one goes on.
        assert sorted(world.engine.cancelled) == [2, 3, 4]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await finished(call)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert peak < 9 << 20
        assert await modest_call.read()


# --- clients that do not send, or send too much -----------------------------------


@in_loop
async def test_a_request_that_does_not_come_is_not_waited_for():
    world = World()
    async with grpc_served(world, changed(client_timeout_s=0.2)) as served:
        call = served.channel.stream_unary("/lorax.v1.Lorax/Generate")()
        found = await refused(call)
        assert (found.code, found.text) == (
            "DEADLINE_EXCEEDED",
            "the request did not come in time",
        )
        assert served.server.boundary.num_open == 0
        assert world.metric("lorax_request_failure_total", err="bad_request") == 1


@in_loop
async def test_a_request_that_is_too_large_is_refused_before_it_is_read():
    async with grpc_served(World(), changed(max_message_bytes=10_000)) as served:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.stub.Generate(request("w1 " * 5_000), timeout=30)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "10000" in raised.value.details()


@in_loop
async def test_a_small_message_that_becomes_a_large_one_is_refused():
    world = World()
    async with grpc_served(world, changed(max_message_bytes=100_000)) as served:
        large = request("w" * 50_000_000)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await served.stub.Generate(large, compression=grpc.Compression.Gzip, timeout=30)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "gzip" in raised.value.details()


@in_loop
async def test_calls_beyond_the_bound_are_refused_and_others_go_on():
    world = World()
    async with grpc_served(world, changed(max_calls=3)) as served:
        opened = [served.channel.stream_unary("/lorax.v1.Lorax/Info")() for _ in range(3)]
        await until(lambda: served.server.boundary.num_open == 3)
        found = await refused(served.stub.Info(pb.InfoRequest(), timeout=30))
        assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
        opened[0].cancel()
        await until(lambda: served.server.boundary.num_open == 2)
        assert (await served.stub.Info(pb.InfoRequest(), timeout=30)).version
        for call in opened:
            call.cancel()


@in_loop
async def test_streams_of_one_connection_are_bounded_and_other_connections_go_on():
    world = World(max_concurrent_requests=500)
    world.engine.open.clear()
    async with grpc_served(world, changed(max_streams=8)) as served, narrow_client(served) as other:
        # From here on the client knows the bound; what it sends before that is refused.
        assert (await served.stub.Info(pb.InfoRequest(), timeout=30)).version
        calls = [served.stub.GenerateStream(request()) for _ in range(20)]
        reading = [asyncio.ensure_future(finished(call)) for call in calls]
        await until(lambda: len(world.engine.submitted) == 8)
        assert (await other.Info(pb.InfoRequest(), timeout=30)).version
        assert len(world.engine.submitted) == 8
        world.engine.open.set()
        # The others wait in the client; one that comes too early is refused and may be sent again.
        ends = await asyncio.gather(*reading, return_exceptions=True)
        codes = {each.code() for each in ends if each is not None}
        assert codes <= {grpc.StatusCode.UNAVAILABLE}
        assert ends.count(None) >= 8
