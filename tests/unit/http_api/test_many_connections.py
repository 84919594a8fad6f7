"""Thousands of connections are looked at without holding up who is served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from tests.helpers.in_loop import in_loop

from lorax_router.http_api.connection import ConnectionLimits
from lorax_router.http_api.connections import Connections


class IdleConnection:
    """Stands in for a connection: notes how many were looked at, and what it was cut for."""

    unread_bytes = 0

    def __init__(self, looked_at: list[Any]) -> None:
        self._looked_at = looked_at
        self.words = ""

    def check(self, _now: float) -> None:
        self._looked_at.append(self)

    def cut(self, why: str) -> None:
        self.words = why


def crowd(number: int, **limits: Any) -> tuple[Connections, list[Any], list[Any]]:
    connections, looked_at = Connections(ConnectionLimits(max_connections=number, **limits)), []
    members: list[Any] = [IdleConnection(looked_at) for _ in range(number)]
    for each in members:
        connections.add(each)
    return connections, members, looked_at


@contextlib.asynccontextmanager
async def watched(connections: Connections) -> Any:
    watching = asyncio.create_task(connections.watch())
    try:
        yield
    finally:
        watching.cancel()


@in_loop
async def test_others_have_their_turn_while_all_are_looked_at() -> None:
    connections, members, looked_at = crowd(5_000, client_timeout_s=0.04)
    seen = set()
    async with watched(connections):
        while len(looked_at) < len(members):
            await asyncio.sleep(0)
            seen.add(len(looked_at))
    assert set(looked_at) == set(members)
    # Not all at once: somebody else ran in between, many times.
    assert len([number for number in seen if 0 < number < len(members)]) >= 10


@in_loop
async def test_who_left_between_two_parts_is_not_looked_at() -> None:
    connections, members, looked_at = crowd(1_000, client_timeout_s=0.04)
    async with watched(connections):
        while not looked_at:
            await asyncio.sleep(0)
        gone = set(members) - set(looked_at)
        for each in gone:
            connections.remove(each)
        assert gone
        await asyncio.sleep(0.05)
    assert not gone & set(looked_at)


@in_loop
async def test_who_holds_most_is_cut_though_they_were_looked_at_in_parts() -> None:
    bounds = {"client_timeout_s": 0.04, "max_all_unread_bytes": 1_000}
    connections, members, _ = crowd(1_000, **bounds)
    members[3].unread_bytes, members[900].unread_bytes = 600, 700
    async with watched(connections):
        while not members[900].words:
            await asyncio.sleep(0.01)
    assert "too much left to read" in members[900].words
    assert not members[3].words
