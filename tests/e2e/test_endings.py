"""How a server under load ends: by a signal, or because one of its processes is killed.

And how it does not: shards that are killed start again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import httpx
import psutil
import pytest
from tests.helpers.child_processes import command_line, running_children
from tests.helpers.http_app import events
from tests.helpers.server import Server

NUM_STREAMS = 10
MAX_NEW_TOKENS = 250


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 90))


def children_of(server: Server) -> dict[str, psutil.Process]:
    """The launcher's children by the program they run."""
    assert server.process is not None
    launcher = psutil.Process(server.process.pid)
    found = {}
    for name in ("lorax-shard", "lorax-router"):
        found[name] = running_children(name, launcher)[-1]
    return found


def wait_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, [command_line(process) for process in alive]


class Crowd:
    """Streams that run; what each of them has received once it has ended."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.texts = [""] * NUM_STREAMS

    async def start(self, stack: AsyncExitStack) -> list[asyncio.Task[None]]:
        """Open all streams at once and wait until each has a token."""
        places = range(NUM_STREAMS)
        streams = await asyncio.gather(*(self._open(place, stack) for place in places))
        return [asyncio.create_task(self._read(place, streams[place])) for place in places]

    async def _open(self, place: int, stack: AsyncExitStack) -> Any:
        params: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "ignore_eos_token": True}
        if place % 2:
            params |= {"do_sample": True, "seed": place, "top_n_tokens": 2, "details": True}
        body = {"inputs": "the quick brown fox", "parameters": params}
        stream = await stack.enter_async_context(
            self.http.stream("POST", "/generate_stream", json=body)
        )
        chunks = stream.aiter_text()
        self.texts[place] = await anext(chunks)
        return chunks

    async def _read(self, place: int, chunks: Any) -> None:
        async for chunk in chunks:
            self.texts[place] += chunk


async def crowd_until(server: Server, act: Callable[[httpx.AsyncClient], Any]) -> list[list[Any]]:
    """Run streams, do something to the server, and return the events of each stream."""
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60) as http,
        AsyncExitStack() as stack,
    ):
        crowd = Crowd(http)
        tasks = await crowd.start(stack)
        await act(http)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, httpx.HTTPError) for end in ends), ends
    # Of a connection that was cut, the last event may be there in part.
    return [events(text[: text.rfind("\n\n") + 2]) for text in crowd.texts]


def tokens_of(streams: list[list[Any]]) -> list[list[tuple[int, str]]]:
    return [[(each["token"]["id"], each["token"]["text"]) for each in stream] for stream in streams]


async def refuses(http: httpx.AsyncClient) -> bool:
    """Whether a new request is turned away: by an answer, or by nobody listening."""
    try:
        answer = await http.post(
            "/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 1}}
        )
    except httpx.TransportError:
        return True
    assert answer.status_code in (200, 503)
    return answer.status_code == 503


async def is_away(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health")).status_code != 200
    except httpx.ConnectError:
        return True


def test_sigterm_lets_running_streams_finish_and_turns_new_requests_away(launch):
    with launch() as server:
        children = list(children_of(server).values())

        async def terminate(http: httpx.AsyncClient) -> None:
            os.kill(server.process.pid, signal.SIGTERM)
            while not await refuses(http):
                await asyncio.sleep(0.01)

        async def scene() -> None:
            for stream in await crowd_until(server, terminate):
                assert len(stream) == MAX_NEW_TOKENS
                assert stream[-1]["generated_text"]

        play(scene())
        assert server.process.wait(30) == 0
        wait_gone(children)


@pytest.mark.parametrize("name", ["lorax-shard", "lorax-router", "launcher"])
def test_a_process_that_is_killed_under_load_takes_the_others_along(launch, name):
    with launch("--restarts", "0") as server:
        children = children_of(server)
        victim = children.get(name) or psutil.Process(server.process.pid)

        async def kill(http: httpx.AsyncClient) -> None:
            victim.send_signal(signal.SIGKILL)

        async def scene() -> None:
            streams = await crowd_until(server, kill)
            running = [each for each in streams if len(each) < MAX_NEW_TOKENS]
            # On a busy machine some may be over before anybody is killed.
            assert running
            for stream in running:
                if name == "lorax-shard":
                    # Every stream is told, in the words of one event and nothing of the inside.
                    *tokens, last = stream
                    assert all("token" in event for event in tokens)
                    assert last["error_type"] == "generation"
                    assert "unix:" not in last["error"]
                else:
                    assert all("token" in event for event in stream)

        play(scene())
        code = server.process.wait(40)
        wait_gone(list(children.values()))
        if name == "launcher":
            assert code == -signal.SIGKILL
            return
        assert code > 0
        deadline = time.monotonic() + 10
        while not (lines := [each for each in server.lines if "SIGKILL" in each]):
            assert time.monotonic() < deadline, server.lines[-10:]
            time.sleep(0.02)
        (line,) = lines
        assert "ERROR" in line
        assert ("shard-0" if name == "lorax-shard" else "router") in line


def test_streams_go_on_when_the_shards_are_killed(launch):
    """Each is what it is undisturbed: greedy, and drawn by its seed; so are later requests."""
    with launch() as server:

        async def leave_alone(_: httpx.AsyncClient) -> None:
            pass

        async def kill(_: httpx.AsyncClient) -> None:
            children_of(server)["lorax-shard"].send_signal(signal.SIGKILL)

        async def scene() -> None:
            expected = tokens_of(await crowd_until(server, leave_alone))
            for _ in range(2):
                router = children_of(server)["lorax-router"].pid
                streams = await crowd_until(server, kill)
                assert tokens_of(streams) == expected
                assert all(each[-1]["generated_text"] for each in streams)
                assert children_of(server)["lorax-router"].pid == router
                async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
                    assert not await refuses(http)
                    assert (await http.get("/health")).status_code == 200

        play(scene())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0


def test_a_router_that_is_killed_starts_again_and_takes_the_shards_over(launch):
    """At the same ports, from the same shard, with the same answers; streams of the first one end."""
    body = {"inputs": "w1 w2 w3", "parameters": {"max_new_tokens": 20, "ignore_eos_token": True}}
    with launch() as server:
        answer, shard = server.post("/generate", body), children_of(server)["lorax-shard"].pid
        for _ in range(2):

            async def kill(_: httpx.AsyncClient) -> None:
                children_of(server)["lorax-router"].send_signal(signal.SIGKILL)

            async def scene() -> None:
                streams = await crowd_until(server, kill)
                assert any(len(stream) < MAX_NEW_TOKENS for stream in streams)
                async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
                    async with asyncio.timeout(60):
                        while await is_away(http):
                            await asyncio.sleep(0.05)

            play(scene())
            assert server.post("/generate", body) == answer
            assert children_of(server)["lorax-shard"].pid == shard
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0
