"""Replicas that know different things are told what they lack, by one who asks them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from lorax_contract.adapters import AdapterRef
from lorax_ingress.exchange import ManagedExchange
from lorax_router.service.adapters.managed import (
    ManagedChange,
    ManagedKind,
    ManagedKnown,
    ManagedRecord,
    Stamp,
)

PATIENCE_S = 2.0


class Replica:
    """Keeps a record; answers once it is let."""

    def __init__(self, name: str, *ids: str) -> None:
        self.name, self.facts = name, SimpleNamespace(takes_changes=True)
        self.record, self.num_asked = ManagedRecord(), 0
        self.answers = asyncio.Event()
        self.answers.set()
        self.record.take(
            ManagedChange(
                kind=ManagedKind.LOAD, ref=AdapterRef.of("hub", id_), stamp=Stamp(1.0, name)
            )
            for id_ in ids
        )

    @property
    def managing(self) -> Any:
        return self

    async def managed(self, changes: Sequence[ManagedChange], since: float = 0.0) -> ManagedKnown:
        self.num_asked += 1
        await self.answers.wait()
        self.record.take(changes)
        return ManagedKnown(changes=self.record.all(since), clock=2.0)


class Fleet:
    """Replicas of which the exchange hears every second."""

    def __init__(self, *replicas: Replica) -> None:
        self.now = 0.0
        self.replicas = {each.name: each for each in replicas}
        self.exchange = ManagedExchange(self.replicas, lambda: self.now)  # type: ignore[arg-type]

    async def hear_for(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            for each in self.replicas.values():
                self.exchange.knows(each.name, each.record.digest)
            for _ in range(10):
                await asyncio.sleep(0)


def test_what_is_not_the_same_for_some_time_is_evened_out() -> None:
    async def scene() -> None:
        fleet = Fleet(Replica("a", "org/x"), Replica("b", "org/y"))
        a, b = fleet.replicas.values()
        await fleet.hear_for(int(PATIENCE_S))
        assert a.num_asked == b.num_asked == 0
        await fleet.hear_for(2)
        assert a.record.all() == b.record.all() != []
        assert a.record.digest == b.record.digest
        asked = a.num_asked
        await fleet.hear_for(10)
        assert a.num_asked == asked

    asyncio.run(scene())


def test_a_replica_that_hangs_is_asked_once() -> None:
    async def scene() -> None:
        fleet = Fleet(Replica("a", "org/x"), Replica("b", "org/y"))
        a, b = fleet.replicas.values()
        b.answers.clear()
        await fleet.hear_for(100)
        assert (a.num_asked, b.num_asked) == (1, 1)
        b.answers.set()
        await fleet.hear_for(4)
        assert a.record.all() == b.record.all()

    asyncio.run(scene())
