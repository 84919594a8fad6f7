"""Two servers are restarted one after the other under load, and no request is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from tests.helpers.round_robin import RoundRobin
from tests.helpers.server import Server

NUM_CLIENTS, NUM_TOKENS = 6, 40


def test_restarted_one_after_the_other_they_lose_no_request(launch: Callable[..., Server]) -> None:
    async def scene() -> None:
        balancer, stop = RoundRobin(), asyncio.Event()
        servers = await asyncio.gather(*(asyncio.to_thread(launch().__enter__) for _ in range(2)))
        try:
            for server in servers:
                balancer.add(server.url)
            async with balancer.watching(), asyncio.TaskGroup() as group:
                clients = [
                    group.create_task(keep_asking(balancer, number, stop))
                    for number in range(NUM_CLIENTS)
                ]
                for place in range(2):
                    before = sum(balancer.num_answers.values())
                    while sum(balancer.num_answers.values()) < before + NUM_CLIENTS:
                        await asyncio.sleep(0.05)
                    old = servers[place]
                    assert await asyncio.to_thread(old.stop, signal.SIGTERM) == 0
                    servers[place] = await asyncio.to_thread(launch().__enter__)
                    balancer.add(servers[place].url)
                    balancer.remove(old.url)
                # Both new ones serve.
                while not {each.url for each in servers} <= set(balancer.num_answers):
                    await asyncio.sleep(0.05)
                stop.set()
            answers = [answer for client in clients for answer in client.result()]
        finally:
            for server in servers:
                await asyncio.to_thread(server.stop)
        check_whole(answers)
        assert len(balancer.num_answers) == 4

    asyncio.run(asyncio.wait_for(scene(), 240))


async def keep_asking(balancer: RoundRobin, number: int, stop: asyncio.Event) -> list[list[str]]:
    """Ask one question after the other; returns the texts of the tokens of each answer."""
    parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True, "seed": number}
    body = {"inputs": "the quick brown fox", "parameters": parameters}
    answers = []
    while not stop.is_set():
        found = await balancer.stream("/generate_stream", body)
        assert found[-1].get("generated_text"), found[-1]
        answers.append([each["token"]["text"] for each in found])
    return answers


def check_whole(answers: list[list[str]]) -> None:
    """All answers are whole, and the same, whichever server gave them."""
    assert len(answers) > 4 * NUM_CLIENTS
    assert {len(each) for each in answers} == {NUM_TOKENS}
    assert len({tuple(each) for each in answers}) == 1
