"""A server that ends answers who is connected and just asks: nobody is left to guess."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections import Counter

import pytest
from tests.helpers.http_app import World, serving, until
from tests.helpers.in_loop import in_loop

from lorax_router.http_api import connection
from lorax_router.http_api.listeners import bind, refuse_new

POST = (
    b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b'content-length: 15\r\n\r\n{"inputs":"w1"}'
)
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a busy machine takes to send a request is no matter here."""
    monkeypatch.setattr(connection, "_LAST_HEAD_S", 20.0)
    monkeypatch.setattr(connection, "_FIRST_HEAD_S", 20.0)


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("sent", [b"", POST[:20]], ids=["nothing", "half a head"])
@pytest.mark.parametrize("before", [b"", HEALTH], ids=["new", "used before"])
@in_loop
async def test_who_is_about_to_ask_is_told_to_ask_elsewhere(sent: bytes, before: bytes) -> None:
    world = World()
    async with serving(world.app) as (url, server):
        reader, writer = await connect(url)
        if before:
            writer.write(before)
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        await until(lambda: len(server.connections) == 1)
        await asyncio.sleep(0.02)
        world.service.stop_admitting()
        server.stop()
        await until(lambda: any(each._is_last for each in server.connections._open))
        writer.write(POST[len(sent) :])
        # To its end: the connection closes with the answer.
        answer = await reader.read()
        assert answer.count(b"HTTP/1.1 ") == 1
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert b"503" in head.splitlines()[0]
        assert b"retry-after:" in head
        writer.close()


@in_loop
async def test_who_asks_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LAST_HEAD_S", 0.01)
    monkeypatch.setattr(connection, "_FIRST_HEAD_S", 0.01)
    async with serving(World().app) as (url, server):
        reader, writer = await connect(url)
        await until(lambda: len(server.connections) == 1)
        server.stop()
        assert await reader.read() == b""
        writer.close()


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a listener's filter is Linux's")


@on_linux
def test_a_listener_that_takes_nobody_new_still_has_who_came_before() -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()) as early:
            refuse_new(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(listener.getsockname(), timeout=0.2)
            accepted, _ = listener.accept()
            with accepted:
                early.sendall(b"x")
                assert accepted.recv(1) == b"x"


@on_linux
@in_loop
async def test_under_load_no_connection_is_reset_as_the_server_ends() -> None:
    found: Counter[str] = Counter()
    for _ in range(3):
        world = World(max_concurrent_requests=64)
        async with serving(world.app) as (url, server):
            clients = [asyncio.create_task(keep_asking(url, found)) for _ in range(12)]
            await until(lambda: found["200"] > 20)
            world.service.stop_admitting()
            await until(lambda: found["503"] > 20)
            server.stop()
            await asyncio.wait_for(asyncio.gather(*clients), 60)
        assert found["gone"] == 12
        found["gone"] = found["200"] = found["503"] = 0
    assert set(found) == {"200", "503", "gone"}


async def keep_asking(url: str, found: Counter[str]) -> None:
    """Ask, each time on a connection of its own, until nobody takes connections any more."""
    while True:
        try:
            reader, writer = await connect(url)
        except ConnectionRefusedError:
            found["gone"] += 1
            return
        try:
            writer.write(POST)
            head = await reader.readuntil(b"\r\n\r\n")
            found[head[9:12].decode()] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            found[f"lost: {type(error).__name__}"] += 1
            return
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
