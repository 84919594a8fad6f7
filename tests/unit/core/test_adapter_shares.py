"""Shares of slots and memory for adapters: a flood of cold ones pushes out its own first."""

from __future__ import annotations

import random

import pytest

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.table import AdapterEvent, AdapterState, AdapterTable

CYCLE_S = 2.0


class Shards:
    """A table whose orders are carried out at once, and tenants who ask for adapters."""

    def __init__(self, slots: int, max_bytes: int | None = None, **shares: float) -> None:
        self.table = AdapterTable(max_resident=slots, max_bytes=max_bytes, cycle_time_s=CYCLE_S)
        self.shares = shares
        self.now = 0.0
        self.numbers: dict[str, int] = {}
        self.owners: dict[int, str] = {}

    def wait(self, tenant: str, number: int, nbytes: int = 1) -> AdapterHandle:
        """A request for one of a tenant's adapters waits."""
        handle = AdapterHandle(number)
        if handle not in self.table:
            self.table.add(handle, nbytes)
            self.owners[number] = tenant
        self.table.asked_by(handle, tenant, self.shares.get(tenant))
        self.table.waits(handle, self.now)
        return handle

    def turn(self, times: int = 2) -> None:
        """Carry out orders."""
        for _ in range(times):
            self.now += 1.0
            orders = self.table.orders(self.now)
            for handle in orders.release:
                self.table.event(handle, AdapterEvent.RELEASED, self.now)
            for handle in orders.prepare:
                self.table.event(handle, AdapterEvent.PREPARED, self.now)
            self.table.check()

    def use(self, tenant: str, number: int, nbytes: int = 1) -> None:
        """A request comes, runs and ends."""
        handle = self.wait(tenant, number, nbytes)
        for _ in range(20):
            if self.table.is_resident(handle):
                break
            self.turn()
        assert self.table.is_resident(handle)
        self.table.runs(handle, self.now)
        self.table.leaves(handle, was_running=True)

    def resident(self, tenant: str) -> set[int]:
        return {
            each.handle
            for each in self.table.snapshot()
            if each.state is AdapterState.RESIDENT and self.owners[each.handle] == tenant
        }


@pytest.mark.parametrize("by_bytes", [False, True])
def test_a_flood_of_cold_adapters_pushes_out_its_own(by_bytes: bool) -> None:
    shards = Shards(100 if by_bytes else 8, 8 if by_bytes else None, ant=0.5)
    for number in (1, 2, 3):
        shards.use("bee", number)
    for number in range(10, 60):
        shards.use("ant", number)
    assert shards.resident("bee") == {1, 2, 3}
    # What nobody else wants is lent.
    assert len(shards.resident("ant")) == 5


def test_without_a_share_the_unused_give_way_to_a_flood() -> None:
    """What the share is good for."""
    shards = Shards(8)
    for number in (1, 2, 3):
        shards.use("bee", number)
    for number in range(10, 60):
        shards.use("ant", number)
    assert shards.resident("bee") == set()


def test_who_is_within_its_share_takes_back_what_was_lent() -> None:
    shards = Shards(8, ant=0.5)
    for number in range(10, 18):
        shards.use("ant", number)
    assert len(shards.resident("ant")) == 8
    for number in (1, 2, 3, 4):
        shards.use("bee", number)
    assert shards.resident("bee") == {1, 2, 3, 4}
    assert len(shards.resident("ant")) == 4


def test_who_is_above_its_share_and_uses_all_of_it_keeps_nobody_behind_it_waiting() -> None:
    shards = Shards(4, ant=0.25, bee=0.75)
    for number in (1, 2):
        shards.use("bee", number)
    for number in (10, 11):
        handle = shards.wait("ant", number)
        shards.turn()
        shards.table.runs(handle, shards.now)
    # All its own are in use, and others' idle ones are not taken for it.
    waiting = shards.wait("ant", 12)
    shards.turn()
    assert not shards.table.is_resident(waiting)
    shards.use("bee", 3)
    assert 3 in shards.resident("bee") and shards.resident("ant") == {10, 11}
    # Its turn comes: one of its own is drained for it.
    for _ in range(4):
        shards.turn()
        for handle in shards.table.overdue(shards.now):
            shards.table.returns(handle, shards.now)
        for handle in (10, 11):
            shards.table.progresses(AdapterHandle(handle), shards.now)
    shards.turn(6)
    assert shards.table.is_resident(waiting)


def test_one_adapter_is_nobodys_flood_however_large_it_is() -> None:
    shards = Shards(4, 10, ant=0.1)
    for number in (1, 2, 3):
        shards.use("bee", number, 3)
    shards.use("ant", 10, 8)
    assert shards.resident("ant") == {10}


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_everybody_gets_a_turn_whatever_the_shares(seed: int) -> None:
    draw = random.Random(seed)
    tenants = {"ant": 0.25, "bee": 0.5, "cat": 0.1}
    shards = Shards(draw.randint(2, 6), draw.choice([None, 8]), **tenants)
    names = [*tenants, "dog"]
    for _ in range(150):
        name = draw.choice(names)
        number = 10 * (names.index(name) + 1) + draw.randrange(8)
        shards.use(name, number, nbytes=draw.choice([1, 2]))
