"""Clients that do not read, do not ask, or do not finish: what they hold is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Coroutine, Iterator
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
import uvloop
from tests.helpers.http_app import World, limits, serving, until
from tests.helpers.scripted_engine import ScriptedEngine, words

from lorax_contract.step import RequestSpec
from lorax_router.http_api import server as server_module
from lorax_router.http_api.connection import MAX_HEAD_BYTES, ConnectionLimits
from lorax_router.http_api.server import HttpServer
from lorax_router.service.engine.port import TokenChunk

# Far above what these tests take: where time matters, it is passed by hand.
PATIENT = ConnectionLimits(client_timeout_s=10_000.0, idle_s=30_000.0)
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def play(scene: Coroutine[None, None, None]) -> None:
    """On the event loop that the router runs on."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scene, 60))


def changed(**values: Any) -> ConnectionLimits:
    return ConnectionLimits(**{"client_timeout_s": 10_000.0, "idle_s": 30_000.0, **values})


class Client:
    """A connection that reads only when it is told to, with a small buffer in the system."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.setblocking(False)

    async def __aenter__(self) -> Self:
        where = (self._address.hostname, self._address.port)
        await asyncio.get_running_loop().sock_connect(self._socket, where)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def read(self, size: int = 1 << 16) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._socket, size)

    async def read_to_end(self) -> bytes:
        """All that comes until the server closes; a reset is an end, too."""
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := await self.read():
                parts.append(part)
        return b"".join(parts)

    async def is_closed(self) -> bool:
        return await self.read_to_end() == b""


def post(path: str, **params: Any) -> bytes:
    body = json.dumps({"inputs": "w1", "parameters": params}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def chunked(path: str, headers: bytes = b"content-type: application/json\r\n") -> bytes:
    head = b"POST %s HTTP/1.1\r\nhost: x\r\n%s" % (path.encode(), headers)
    return head + b"transfer-encoding: chunked\r\n\r\n"


def verbose(num: int) -> ScriptedEngine:
    """An engine whose tokens are 15 kB of events each."""
    return ScriptedEngine(lambda spec: words(*(f" w{i}" for i in range(num)), num_alternatives=256))


def world_of(engine: ScriptedEngine, **settings: Any) -> World:
    return World(engine=engine, bounds=limits(max_total_tokens=10**6), **settings)


async def healthy(url: str) -> bool:
    async with Client(url) as client:
        await client.send(HEALTH)
        return b" 200 " in await client.read()


def later(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def settled(server: HttpServer, number: int) -> None:
    await until(lambda: len(server.connections) == number)


# --- clients that do not read -----------------------------------------------------


@pytest.mark.parametrize("path", ["/generate_stream", "/generate"])
def test_a_place_is_free_when_the_generation_ends_not_when_its_client_has_read_it(path):
    async def run() -> None:
        world = world_of(verbose(400), max_concurrent_requests=4)
        limits = changed(max_unread_bytes=64 << 20)
        async with (
            serving(world.app, limits=limits) as (url, _),
            contextlib.AsyncExitStack() as stack,
        ):
            clients = [await stack.enter_async_context(Client(url)) for _ in range(4)]
            for client in clients:
                await client.send(post(path, details=True, return_k_alternatives=256))
            await until(lambda: len(world.engine.submitted) == 4, 30)
            await asyncio.wait_for(world.service.wait_idle(), 30)
            assert world.metric("lorax_request_success_total") == 4
            async with Client(url) as other:
                await other.send(post("/generate", max_new_tokens=1))
                assert b" 200 " in await other.read()
            # Nothing is lost for who reads in the end.
            text = b""
            while b'"w399"' not in text[-50_000:] and b" w399" not in text[-50_000:]:
                text += await clients[0].read()

    play(run())


def endless(spec: RequestSpec) -> Iterator[TokenChunk]:
    while True:
        yield next(words(" w", " w", num_alternatives=256))


def test_a_stream_that_is_too_far_behind_is_ended_and_its_row_with_it():
    async def run() -> None:
        world = world_of(ScriptedEngine(endless), max_concurrent_requests=2)
        async with serving(world.app, limits=changed(max_unread_bytes=1 << 18)) as (url, _):
            async with Client(url) as one, Client(url) as two:
                for client in (one, two):
                    await client.send(post("/generate_stream", return_k_alternatives=256))
                await until(lambda: sorted(world.engine.cancelled) == [1, 2], 30)
            await world.service.wait_idle()
            assert world.metric("lorax_request_failure_total", err="dropped") == 2
            assert await healthy(url)

    play(run())


def test_a_client_that_stops_reading_loses_its_stream_after_a_while():
    async def run() -> None:
        def script(spec: RequestSpec) -> Iterator[TokenChunk]:
            for place, chunk in enumerate(endless(spec)):
                if place == 400:
                    world.engine.open.clear()
                yield chunk

        world = world_of(ScriptedEngine(script))
        async with (
            serving(world.app, limits=changed(max_unread_bytes=64 << 20)) as (url, server),
            Client(url) as client,
        ):
            await client.send(post("/generate_stream", return_k_alternatives=256))
            await until(lambda: not world.engine.open.is_set(), 30)
            now = later(0)
            for seconds in (0, 9_999):
                server.connections.check(now + seconds)
                await asyncio.sleep(0)
                assert world.engine.cancelled == []
            server.connections.check(now + 10_001)
            await until(lambda: world.engine.cancelled == [1])

    play(run())


def test_a_client_that_reads_slowly_and_steadily_gets_everything():
    async def run() -> None:
        world = world_of(verbose(300))
        async with (
            serving(world.app, limits=changed(max_unread_bytes=64 << 20)) as (url, server),
            Client(url) as client,
        ):
            await client.send(post("/generate", details=True, return_k_alternatives=256))
            text = await client.read()
            size = int(text.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            now = later(0)
            server.connections.check(now)
            while len(text) < size:
                # More than the system keeps, so that the server could write some more.
                part = bytearray()
                while len(part) < 1 << 20 and len(text) + len(part) < size:
                    part += await client.read()
                    assert part
                text += part
                assert len(text) >= size or await healthy(url)
                now += 9_000
                server.connections.check(now)

    play(run())


def test_all_clients_together_are_bounded_and_who_holds_most_goes_first():
    async def run() -> None:
        world = world_of(verbose(400))
        bounds = changed(max_unread_bytes=64 << 20, max_all_unread_bytes=1 << 20)
        async with (
            serving(world.app, limits=bounds) as (url, server),
            Client(url) as greedy,
            Client(url) as modest,
        ):
            await modest.send(HEALTH)
            await greedy.send(post("/generate", details=True, return_k_alternatives=256))
            await until(lambda: world.metric("lorax_request_success_total") == 1, 30)
            await settled(server, 2)
            server.connections.check(later(0))
            await settled(server, 1)
            assert b" 200 " in await modest.read()

    play(run())


def test_who_asks_for_more_and_reads_nothing_is_cut():
    async def run() -> None:
        world = world_of(verbose(400))
        bounds = changed(max_unread_bytes=1 << 18)
        async with serving(world.app, limits=bounds) as (url, server), Client(url) as client:
            request = post("/generate", details=True, return_k_alternatives=256)
            await client.send(request * 3)
            await until(lambda: world.engine.submitted)
            await settled(server, 0)
            assert len(world.engine.submitted) == 1
            assert await healthy(url)

    play(run())


# --- clients that do not ask ------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "limit_s", "answer"),
    [
        (b"", 10_000, b""),
        (b"\r\n", 10_000, b" 408 "),
        (b"GET /health HTT", 10_000, b" 408 "),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n", 10_000, b" 408 "),
        (post("/generate")[:-3], 10_000, b" 408 "),
        (chunked("/generate") + b"2\r\n{}\r\n0\r\nx-trailer: ", 10_000, b" 408 "),
        (HEALTH, 30_000, b" 200 "),
        (HEALTH + b"GET /he", 10_000, b" 200 "),
    ],
)
def test_what_never_comes_is_waited_for_only_so_long(sent, limit_s, answer):
    async def run() -> None:
        world = World()
        async with serving(world.app, limits=PATIENT) as (url, server), Client(url) as client:
            await client.send(sent)
            for seconds in (0, limit_s - 50):
                # By the answer the server has taken what was sent before.
                assert await healthy(url)
                await settled(server, 1)
                server.connections.check(later(seconds))
            server.connections.check(later(limit_s + 50))
            text = await client.read_to_end()
            assert answer in text[:20]
            if answer == b" 408 ":
                assert json.loads(text.partition(b"\r\n\r\n")[2])["error_type"] == "bad_request"
            await settled(server, 0)
            assert world.engine.submitted == []

    play(run())


def test_a_body_that_keeps_coming_is_waited_for():
    async def run() -> None:
        world = World()
        bounds = changed(client_timeout_s=10.0, body_bytes_per_s=1.0)
        async with serving(world.app, limits=bounds) as (url, server), Client(url) as client:
            request = post("/generate", max_new_tokens=1)
            await client.send(request[:-4])
            assert await healthy(url)
            server.connections.check(later(40))
            await client.send(request[-4:])
            assert b" 200 " in await client.read()

    play(run())


def test_a_request_that_is_being_answered_may_take_as_long_as_it_takes():
    async def run() -> None:
        world = World()
        world.engine.open.clear()
        async with serving(world.app, limits=PATIENT) as (url, server), Client(url) as client:
            # The head of the next one began, and waits for the answer as its client does.
            await client.send(post("/generate", max_new_tokens=1) + b"GET /hea")
            await until(lambda: world.engine.submitted)
            server.connections.check(later(10**6))
            server.connections.check(later(2 * 10**6))
            world.engine.open.set()
            assert b" 200 " in await client.read()

    play(run())


def test_connections_are_counted_and_who_only_waits_makes_room():
    async def run() -> None:
        world = World()
        async with (
            serving(world.app, limits=changed(max_connections=3)) as (url, _),
            contextlib.AsyncExitStack() as stack,
        ):
            idle = []
            for begun in (b"", b"POST /gen", HEALTH):
                idle.append(await stack.enter_async_context(Client(url)))
                await idle[-1].send(begun)
            assert b" 200 " in await idle[2].read()
            # One more comes, is answered and leaves; the first of the others went for it.
            assert await healthy(url)
            assert await idle[0].is_closed()
            await idle[2].send(HEALTH)
            assert b" 200 " in await idle[2].read()

    play(run())


def test_where_all_connections_are_at_work_one_more_is_refused_in_words():
    async def run() -> None:
        world = World()
        world.engine.open.clear()
        async with (
            serving(world.app, limits=changed(max_connections=2)) as (url, server),
            Client(url) as one,
            Client(url) as two,
        ):
            for client in (one, two):
                await client.send(post("/generate", max_new_tokens=1))
            await until(lambda: len(world.engine.submitted) == 2)
            async with Client(url) as three:
                text = (await three.read_to_end()).lower()
                assert text.startswith(b"http/1.1 429 ")
                assert b"retry-after: 1" in text
                assert b'"error_type":"overloaded"' in text
            await settled(server, 2)
            world.engine.open.set()
            for client in (one, two):
                assert b" 200 " in await client.read()
            assert await healthy(url)

    play(run())


# --- what is neither head nor body ------------------------------------------------


@pytest.mark.parametrize(
    ("begun", "words"),
    [
        (b"GET / HTTP/1.1\r\nx-long: ", "The head of the request"),
        (chunked("/generate") + b"0\r\n", "What frames the body"),
        (chunked("/generate") + b"0\r\nx-trailer: ", "What frames the body"),
        (chunked("/generate") + b"1;", "What frames the body"),
        (chunked("/generate") + b"2\r\n{}\r\n1;x=", "What frames the body"),
    ],
)
def test_what_frames_a_request_is_bounded(begun, words):
    async def run() -> None:
        world = World()
        async with serving(world.app, limits=PATIENT) as (url, _), Client(url) as client:
            await client.send(begun)
            line = b"x-more: " + b"a" * 100 + b"\r\n" if begun.endswith(b"0\r\n") else b"a" * 100
            for _ in range(2 * MAX_HEAD_BYTES // len(line)):
                try:
                    await client.send(line)
                except ConnectionError:
                    break
                await asyncio.sleep(0)
            text = await client.read_to_end()
            # What was still on its way when the server closed may have reset the connection.
            assert not text or f"{words} is too long" in text.decode()
            assert await healthy(url)

    play(run())


def test_a_trailer_is_no_header():
    async def run() -> None:
        async with serving(World().app) as (url, _), Client(url) as client:
            body = b'{"inputs": "w1"}'
            trailer = b"content-type: application/json\r\n\r\n"
            await client.send(
                chunked("/generate", b"") + b"%x\r\n%s\r\n0\r\n" % (len(body), body) + trailer
            )
            assert b" 415 " in await client.read()

    play(run())


# --- the end ----------------------------------------------------------------------


def test_at_the_end_who_does_not_read_is_not_waited_for(caplog):
    async def run() -> None:
        world = world_of(verbose(300))
        bounds = changed(max_unread_bytes=64 << 20)
        async with contextlib.AsyncExitStack() as stack:
            async with serving(world.app, limits=bounds, flush_s=0.05) as (url, server):
                for path in ("/generate", "/generate_stream"):
                    client = await stack.enter_async_context(Client(url))
                    await client.send(post(path, details=True, return_k_alternatives=256))
                await asyncio.wait_for(until(lambda: len(world.engine.submitted) == 2, 30), 30)
                await world.service.wait_idle()
            assert len(server.connections) == 0

    play(run())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_at_the_end_a_request_that_hears_nothing_is_no_error_of_the_server(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server_module, "_NOTICE_S", 0.05)
    began = asyncio.Event()

    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        await asyncio.Event().wait()

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with serving(deaf, flush_s=0.05) as (url, server):
                client = await stack.enter_async_context(Client(url))
                await client.send(HEALTH)
                await began.wait()
            # The client stayed to the end.
            assert len(server.connections) == 0

    play(run())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "CancelledError" not in caplog.text
    assert "/health was still being answered at the end" in caplog.text
