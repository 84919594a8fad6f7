"""Clients that speak HTTP/2 by hand: pings, streams and connections without end are all bounded."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import Any

import grpc
import pytest
from tests.helpers.grpc_calls import Served, grpc_served
from tests.helpers.http2_frames import (
    ENHANCE_YOUR_CALM,
    GOAWAY,
    PING,
    RST,
    SETTINGS,
    asked,
    frame,
    opening,
    raw_client,
)
from tests.helpers.http_app import World, until
from tests.helpers.in_loop import in_loop

from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub
from lorax_router.grpc_api.connections import cut
from lorax_router.grpc_api.limits import CallLimits


def changed(**values: Any) -> CallLimits:
    return CallLimits(**{"client_timeout_s": 10_000.0, **values})


async def answers(served: Served) -> bool:
    """Whether another client is served."""
    return bool((await served.stub.Info(pb.InfoRequest(), timeout=30)).version)


@in_loop
async def test_a_flood_of_pings_ends_its_connection():
    async with grpc_served(World(), changed()) as served, raw_client(served.port) as client:
        client.send(*(frame(PING, bytes(8)) for _ in range(200)))
        frames = await asyncio.wait_for(client.kinds_to_the_end(), 30)
        (reason,) = [payload for kind, payload in frames if kind == GOAWAY]
        assert int.from_bytes(reason[4:8]) == ENHANCE_YOUR_CALM
        assert b"too_many_pings" in reason
        assert await answers(served)


@in_loop
async def test_streams_that_are_opened_and_reset_without_end_hold_nothing():
    world = World()
    async with grpc_served(world, changed(max_streams=16)) as served:
        async with raw_client(served.port) as client:
            for start in range(0, 4_000, 200):
                for number in range(start, start + 200):
                    stream = 2 * number + 1
                    client.send(
                        opening(stream, "/lorax.v1.Lorax/Info"),
                        frame(RST, struct.pack(">I", 8), stream=stream),
                    )
                await asyncio.sleep(0)
                assert served.server.boundary.num_open <= 200
            assert await answers(served)
        await until(lambda: served.server.boundary.num_open == 0)


@in_loop
async def test_streams_beyond_the_bound_of_a_connection_are_refused():
    async with grpc_served(World(), changed(max_streams=4)) as served:
        async with raw_client(served.port) as client:
            # The bound counts for who has heard of it, as every client does with the first frame.
            while (await client.frame())[0] != SETTINGS:
                pass
            client.send(frame(SETTINGS, flags=1))
            client.send(*(opening(2 * n + 1, "/lorax.v1.Lorax/Info") for n in range(50)))
            num_refused = 0
            while num_refused < 46:
                kind, _ = await asyncio.wait_for(client.frame(), 30)
                num_refused += kind == RST
            await until(lambda: served.server.boundary.num_open == 4)
            assert await answers(served)
        await until(lambda: served.server.boundary.num_open == 0)


@in_loop
async def test_connections_beyond_the_bound_are_closed_and_a_place_comes_back():
    async with grpc_served(World(), changed(max_connections=3)) as served:
        async with raw_client(served.port) as one, raw_client(served.port) as two:
            for client in (one, two):
                assert (await client.frame())[0] == SETTINGS
            assert await answers(served)
            async with raw_client(served.port) as third:
                assert await asyncio.wait_for(third.kinds_to_the_end(), 30) == []
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(served.address, options=options) as channel:
            call = LoraxStub(channel).Info(pb.InfoRequest(), timeout=30, wait_for_ready=True)
            assert (await call).version


@in_loop
async def test_a_connection_that_says_nothing_is_closed():
    async with (
        grpc_served(World(), changed(client_timeout_s=0.3)) as served,
        raw_client(served.port, greets=False) as client,
    ):
        await asyncio.wait_for(client.kinds_to_the_end(), 30)
        assert await answers(served)


@pytest.mark.parametrize("name", ["Generate", "GenerateStream", "Info"])
def test_a_client_without_a_window_holds_one_message_and_no_place(name):
    @in_loop
    async def scene():
        world = World(max_concurrent_requests=2)
        request = pb.GenerateRequest(text="w1", parameters=pb.Parameters(max_new_tokens=20))
        message = b"" if name == "Info" else request.SerializeToString()
        async with grpc_served(world, changed(client_timeout_s=0.5)) as served:
            boundary = served.server.boundary
            async with raw_client(served.port, window=0) as client:
                client.send(asked(1, name, message), asked(3, name, message))
                await until(lambda: boundary.num_open == 2)
                await until(lambda: boundary.unread.total > 0)
                await asyncio.wait_for(world.service.wait_idle(), 30)
                assert (await served.stub.Generate(request, timeout=30)).sequences
                # What waits behind the first message is dropped.
                await until(lambda: boundary.unread.total < 1_000)
            await until(lambda: boundary.num_open == 0)
            assert boundary.unread.total == 0

    scene()


@in_loop
async def test_calls_that_nobody_reads_give_way_to_others():
    bounds = changed(client_timeout_s=0.3, max_calls=6)
    async with grpc_served(World(), bounds) as served, raw_client(served.port, window=0) as client:
        boundary = served.server.boundary
        client.send(*(asked(2 * n + 1, "Info", b"") for n in range(6)))
        await until(lambda: boundary.num_open == 6)

        async def serves_others() -> None:
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await served.stub.Info(pb.InfoRequest(), timeout=30)
                    return
                await asyncio.sleep(0.05)

        # Whoever does not read is cut as soon as its calls have ended and a place is wanted.
        await asyncio.wait_for(serves_others(), 30)
        await asyncio.wait_for(client.kinds_to_the_end(), 30)
        await until(lambda: boundary.num_open == 0)


@pytest.mark.parametrize("peer", ["unix:", "ipv4:127.0.0.1:1", "ipv6:%5B::1%5D:1", "odd", ""])
def test_a_peer_that_is_not_there_is_not_cut(peer):
    assert cut(peer) is False
