"""The client that floods a server books what became of each request."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import pytest
from tests.acceptance.faults.flood import Booked, Flood, arrivals, share
from tests.helpers.http_app import World, served
from tests.helpers.in_loop import in_loop


def request(num_tokens: int) -> tuple[bytes, int]:
    data = json.dumps({"inputs": "w1", "parameters": {"max_new_tokens": num_tokens}}).encode()
    head = (
        "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    )
    return f"{head}{len(data)}\r\n\r\n".encode() + data, num_tokens


def test_arrivals_are_as_many_as_asked_for_and_the_same_again() -> None:
    times = list(arrivals(200.0, 50.0, seed=3))
    assert times == sorted(times) == list(arrivals(200.0, 50.0, seed=3))
    assert 9_000 < len(times) < 11_000
    assert times != list(arrivals(200.0, 50.0, seed=4))


@pytest.mark.parametrize(("part", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_a_share_is_the_value_that_so_many_do_not_exceed(part: float, value: int) -> None:
    assert share(list(range(1, 101)), part) == value


def test_a_share_of_nothing_is_0() -> None:
    assert share([], 0.5) == 0.0


async def flooded(world: World) -> Booked:
    async with served(world) as url:
        flood = Flood(urlsplit(url).port or 0, [request(2), request(3)])
        # On a busy machine no answer may come for a while.
        for seconds in (0.3, 1.0, 3.0, 9.0):
            booked = await flood.open(100.0, seconds, seed=1)
            await flood.rest()
            if booked.seconds:
                break
        one = await flood.one()
        flood.close()
    assert one.num_offered == 1
    return booked


@in_loop
async def test_what_is_served_counts_with_its_tokens() -> None:
    booked = await flooded(World())
    served = booked.statuses()[200]
    assert set(booked.statuses()) == {200}
    assert 2 * served <= booked.num_tokens <= 3 * served
    assert booked.refused_s == []


@in_loop
async def test_what_is_refused_counts_with_its_time_and_what_it_was_told() -> None:
    booked = await flooded(World(max_concurrent_requests=0))
    assert booked.statuses()[429] == len(booked.refused_s) > 0
    assert booked.num_without_retry == booked.num_tokens == 0


@in_loop
async def test_where_nobody_listens_no_answer_is_booked() -> None:
    async with served(World()) as url:
        port = urlsplit(url).port or 0
    booked = await Flood(port, [request(2)]).one()
    assert booked.statuses() == {0: 1}
