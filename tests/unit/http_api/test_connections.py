"""What real connections do: leave, pipeline, idle, send what is no HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from functools import partial
from urllib.parse import urlsplit

import pytest
from tests.helpers.http_app import World, served, until
from tests.helpers.scripted_engine import ScriptedEngine, failure

from lorax_contract.errors import GenerationError
from lorax_router.http_api.connection import MAX_HEAD_BYTES
from lorax_router.http_api.lorax import generate_routes
from lorax_router.http_api.sse import TokenEvents

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def play(scene: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


async def connect(url: str) -> Streams:
    address = urlsplit(url)
    return await asyncio.open_connection(address.hostname, address.port)


def post(path: str, inputs: str = "w1", **params: object) -> bytes:
    body = json.dumps({"inputs": inputs, "parameters": params}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_w34_a_client_that_leaves_while_queued_loses_its_place_at_once(path):
    """LoRAX notices when the request reaches the head of the queue."""

    async def run() -> None:
        world = World(max_concurrent_requests=1)
        world.engine.open.clear()
        async with served(world) as url:
            _, writer = await connect(url)
            writer.write(post(path))
            await until(lambda: world.engine.submitted)
            writer.transport.abort()
            await until(lambda: world.engine.cancelled == [1])
            assert world.metric("lorax_request_failure_total", err="dropped") == 1
            world.engine.open.set()
            reader, writer = await connect(url)
            writer.write(post("/generate"))
            assert b" 200 " in await reader.readline()
            writer.close()

    play(run())


def test_w3_a_client_that_leaves_in_mid_stream_ends_its_request_and_nothing_else():
    """LoRAX's server can end when a client leaves while an error is on its way to it."""

    async def run() -> None:
        world = World(engine=ScriptedEngine(delay_s=0.002))
        async with served(world) as url:
            stayer, staying = await connect(url)
            staying.write(post("/generate_stream", max_new_tokens=28))
            leaver, leaving = await connect(url)
            leaving.write(post("/generate_stream", "w2", max_new_tokens=28))
            await leaver.readuntil(b"data: ")
            leaving.transport.abort()
            await until(lambda: world.engine.cancelled)
            (gone,) = world.engine.cancelled
            assert list(world.engine.submitted[gone - 1].prompt_ids) == [900, 2]
            text = await stayer.readuntil(b"0\r\n\r\n")
            assert text.count(b"data: ") == 28
            staying.close()

    play(run())


def test_a_pipelining_client_that_leaves_ends_the_request_that_is_being_answered():
    async def run() -> None:
        world = World()
        world.engine.open.clear()
        async with served(world) as url:
            _, writer = await connect(url)
            writer.write(post("/generate_stream") + post("/generate_stream"))
            await until(lambda: world.engine.submitted)
            await asyncio.sleep(0.02)
            writer.transport.abort()
            await until(lambda: world.engine.cancelled == [1])

    play(run())


def test_requests_on_one_connection_are_answered_in_turn():
    async def run() -> None:
        async with served(World()) as url:
            reader, writer = await connect(url)
            writer.write(post("/generate", max_new_tokens=1) + post("/generate", max_new_tokens=2))
            await reader.readuntil(b'{"generated_text":" w0"}')
            await reader.readuntil(b'{"generated_text":" w0 w1"}')
            writer.close()

    play(run())


def test_an_idle_stream_is_kept_alive_by_comments(monkeypatch):
    monkeypatch.setattr(generate_routes, "TokenEvents", partial(TokenEvents, keep_alive_s=0.01))

    async def run() -> None:
        world = World()
        world.engine.open.clear()
        async with served(world) as url:
            reader, writer = await connect(url)
            writer.write(post("/generate_stream", max_new_tokens=1))
            for _ in range(3):
                await reader.readuntil(b":\n\n")
            world.engine.open.set()
            assert (await reader.readuntil(b"0\r\n\r\n")).count(b"data: ") == 1
            writer.close()

    play(run())


def test_a_stream_that_takes_long_to_begin_is_opened_and_then_fails_by_an_event(monkeypatch):
    """Whatever is on the way to the client would take a silent connection for dead."""
    monkeypatch.setattr(generate_routes, "TokenEvents", partial(TokenEvents, keep_alive_s=0.01))

    async def run() -> None:
        world = World(engine=ScriptedEngine(lambda spec: failure(GenerationError("row failed"))))
        world.engine.open.clear()
        async with served(world) as url:
            reader, writer = await connect(url)
            writer.write(post("/generate_stream"))
            assert b" 200 " in await reader.readline()
            await reader.readuntil(b":\n\n")
            world.engine.open.set()
            assert b'"error_type":"generation"' in await reader.readuntil(b"0\r\n\r\n")
            writer.close()

    play(run())


UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %s\r\nhttp2-settings: AAMAAABk\r\n"


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("num_parts", [1, 7])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_offers_another_protocol_is_answered_in_this_one(
    protocol, num_parts, chunked
):
    """Java's client offers h2c with its first request; its body must not be lost."""

    async def run() -> None:
        async with served(World()) as url:
            reader, writer = await connect(url)
            head, _, body = post("/generate", max_new_tokens=2).partition(b"\r\n\r\n")
            if chunked:
                head = head.partition(b"content-length")[0] + b"transfer-encoding: chunked"
                body = b"5\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
            request = head + b"\r\n" + UPGRADE % protocol + b"\r\n" + body
            size = -(-len(request) // num_parts)
            for start in range(0, len(request), size):
                writer.write(request[start : start + size])
                await asyncio.sleep(0.01)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"connection: close\r\n" in answer
            assert answer.endswith(b'{"generated_text":" w0 w1"}')
            writer.close()

    play(run())


def test_a_health_probe_that_offers_another_protocol_is_answered():
    async def run() -> None:
        async with served(World()) as url:
            reader, writer = await connect(url)
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n" + UPGRADE % b"h2c" + b"\r\n")
            assert b" 200 " in await reader.readline()
            writer.close()

    play(run())


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00 not http\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx-a: \x01\r\n\r\n",
        b"POST /generate HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx-long: " + b"a" * (MAX_HEAD_BYTES + 1),
        b"GET /" + b"a" * (MAX_HEAD_BYTES + 1),
    ],
)
def test_what_is_no_http_gets_json_and_harms_nobody(junk):
    async def run() -> None:
        async with served(World()) as url:
            reader, writer = await connect(url)
            writer.write(junk)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            assert b"content-type: application/json" in head
            assert json.loads(body)["error_type"] == "bad_request"
            writer.close()
            reader, writer = await connect(url)
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 200 " in await reader.readline()
            writer.close()

    play(run())


def test_a_client_that_leaves_in_mid_body_is_forgotten():
    async def run() -> None:
        world = World()
        async with served(world) as url:
            _, writer = await connect(url)
            writer.write(post("/generate")[:-4])
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.transport.abort()
            reader, writer = await connect(url)
            writer.write(post("/generate"))
            assert b" 200 " in await reader.readline()
            writer.close()
            assert len(world.engine.submitted) == 1

    play(run())


def test_two_megabytes_are_refused_while_others_are_served():
    async def run() -> None:
        async with served(World()) as url:
            reader, writer = await connect(url)
            writer.write(post("/generate", "w" * 2**21))
            assert b" 413 " in await reader.readline()
            writer.close()
            reader, writer = await connect(url)
            writer.write(post("/generate"))
            assert b" 200 " in await reader.readline()
            writer.close()

    play(run())
