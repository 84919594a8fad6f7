"""Calls that contradict each other come to several ingresses in one moment; replicas end the same."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from tests.helpers.adapter_world import AdapterWorld, fetched, ref
from tests.helpers.attached_replicas import AttachingFleet, ingress, until
from tests.helpers.in_loop import in_loop
from tests.helpers.managed_replicas import client_of, is_loaded, known, pinned, served
from tests.helpers.single_writer import held_of, single_writer

from lorax_router.fronts.forwarding import ForwardedCalls
from lorax_router.service.adapters.managed import ManagedChange, ManagedKind, Stamp, Taken
from lorax_router.service.adapters.registry import AdapterRegistry

PIRATE = {"adapter_id": "pirate", "adapter_source": "local"}
BARD = {"adapter_id": "bard", "adapter_source": "alias"}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/adapters/load", PIRATE),
    ("/v1/adapters/load", {**PIRATE, "pin": True}),
    ("/v1/adapters/unload", PIRATE),
    ("/v1/adapters/pin", PIRATE),
    ("/v1/adapters/unpin", PIRATE),
    ("/v1/adapters/reload", PIRATE),
    *(
        (
            "/v1/load_lora_adapter",
            {"lora_name": "bard", "lora_path": f"local:{each}", "load_inplace": each != "nun"},
        )
        for each in ("monk", "nun", "poet")
    ),
    ("/v1/unload_lora_adapter", {"lora_name": "bard"}),
]
# What says whether an adapter is there.
DECIDING = (ManagedKind.LOAD, ManagedKind.PIN, ManagedKind.UNLOAD)
NAMES = "abc"
LONGEST_S = 0.03


class DelayedCalls(ForwardedCalls):
    """Calls that come to a replica later than they were sent."""

    def __init__(self, send: Callable[[bytes], None], rng: random.Random) -> None:
        super().__init__(send)
        self._rng = rng

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(LONGEST_S * self._rng.random())
        await super().__call__(scope, receive, send)


@contextlib.asynccontextmanager
async def replicas(folder: Path) -> AsyncIterator[tuple[list[AdapterWorld], dict[str, str]]]:
    uris = {name: f"unix:{folder}/{name}" for name in NAMES}
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(served(each)) for each in uris.values()], uris


@contextlib.asynccontextmanager
async def ingresses(
    uris: dict[str, str], num: int, rng: random.Random
) -> AsyncIterator[list[tuple[AttachingFleet, httpx.AsyncClient]]]:
    """Some of them, each with a client; calls come to replicas in any order."""
    async with contextlib.AsyncExitStack() as stack:
        made = [await stack.enter_async_context(ingress()) for _ in range(num)]
        for each in made:
            for name, uri in uris.items():
                replica = each.attach(name, uri)
                replica.calls = DelayedCalls(replica._send, rng)
        yield [(each, await stack.enter_async_context(client_of(each))) for each in made]


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> set[ManagedChange]:
    """All changes that any replica ever heard of."""
    changes: set[ManagedChange] = set()
    take = AdapterRegistry.take

    def noted(self: AdapterRegistry, told: Iterable[ManagedChange]) -> Taken:
        told = [*told]
        changes.update(told)
        return take(self, told)

    monkeypatch.setattr(AdapterRegistry, "take", noted)
    return changes


async def settled(worlds: list[AdapterWorld]) -> None:
    """Wait until all know the same, and have done what there is to do for it."""
    await until(lambda: len({each.parts.adapters.managed_digest for each in worlds}) == 1)
    await until(lambda: not any(each.parts.adapters.directory._tasks for each in worlds))


def is_true(world: AdapterWorld, history: Iterable[ManagedChange]) -> bool:
    """Whether a server has what it knows of: names, pins, loads, and not what was unloaded last."""
    names = {each.name: each.target.refs[0] for each in world.parts.selections.aliases}
    pins = {(name.ref, tenant) for name in world.catalog.names for tenant in name.pinned_by}
    held, is_there = held_of(known(world)), is_loaded(world, "pirate")
    if (names, pins) != (held.names, held.pins):
        return False
    if world.parts.adapters.registry.record.is_wanted(ref("pirate")):
        return is_there
    # One that was pinned and is not any more stays until its place is wanted.
    pirates = [each for each in history if each.ref == ref("pirate")]
    last = max((each for each in pirates if each.kind in DECIDING), key=by_stamp, default=None)
    return last is None or last.kind is not ManagedKind.UNLOAD or not is_there


def by_stamp(change: ManagedChange) -> Stamp:
    return change.stamp


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorax_ingress.exchange._PATIENCE_S", 0.2)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seed", range(12))
@in_loop
async def test_replicas_end_the_same_and_as_a_single_writer_would(
    tmp_path: Path, history: set[ManagedChange], seed: int
) -> None:
    rng = random.Random(seed)
    async with replicas(tmp_path) as (worlds, uris), ingresses(uris, 2 + seed % 2, rng) as doors:
        await until(lambda: all(len(made.fleet._views) == len(uris) for made, _ in doors))
        for _ in range(6):
            if rng.random() < 0.5:
                plant_slow_source(rng.choice(worlds), rng)
            asked = []
            for path, body in rng.choices(CALLS, k=rng.randint(2, 4)):
                _, client = rng.choice(doors)
                asked.append(client.post(path, json=body))
            answers = await asyncio.gather(*asked)
            assert {each.status_code for each in answers} <= {200, 400, 404}, [
                each.text for each in answers
            ]
            await settled(worlds)
            wanted = single_writer(history)
            for world in worlds:
                assert held_of(known(world)) == wanted
            await until(lambda: all(is_true(world, history) for world in worlds))
            for world in worlds:
                for name, target in wanted.names.items():
                    assert target is not None
                    assert await said(world, name, None) == await said(world, target.id, "local")


async def said(world: AdapterWorld, name: str, source: str | None) -> list[int]:
    answer = await world.generate(name, 5, adapter_source=source)
    return [*answer.sequences[0].tokens.ids]


def plant_slow_source(world: AdapterWorld, rng: random.Random) -> None:
    """What is loaded there takes longer than what takes it back."""
    loop = asyncio.get_running_loop()
    coming = world.sources.contents["pirate"] = loop.create_future()
    loop.call_later(2 * LONGEST_S * rng.random(), coming.set_result, fetched("pirate"))


@pytest.mark.usefixtures("quick")
@in_loop
async def test_what_a_dead_ingress_had_told_some_of_the_others_hear_of_by_another_one(
    tmp_path: Path,
) -> None:
    """Which is attached to all of them all the time."""
    async with replicas(tmp_path) as (worlds, uris), ingresses(uris, 1, random.Random(1)) as doors:
        made, _ = doors[0]
        await until(lambda: len(made.fleet._views) == len(uris))
        # As far as the other one came.
        assert (await worlds[0].post("load", adapter_id="pirate", pin=True)).status_code == 200
        await until(lambda: all(is_loaded(world, "pirate") and pinned(world) for world in worlds))
        await settled(worlds)


@in_loop
async def test_a_call_counts_as_later_than_what_was_done_by_others_with_clocks_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever clocks say then."""
    async with replicas(tmp_path) as (worlds, uris), ingresses(uris, 2, random.Random(1)) as doors:
        await until(lambda: all(len(made.fleet._views) == len(uris) for made, _ in doors))
        first, second = (client for _, client in doors)
        with monkeypatch.context() as patch:
            clock = worlds[1].parts.adapters.registry.clock
            patch.setattr(worlds[1].parts.adapters.registry, "clock", lambda: clock() + 1000)
            assert (await first.post("/v1/adapters/load", json=PIRATE)).status_code == 200
        monkeypatch.setattr("lorax_ingress.exchange.time.time", lambda: 0.0)
        assert (await second.post("/v1/adapters/unload", json=PIRATE)).status_code == 200
        assert not any(is_loaded(world, "pirate") for world in worlds)
        assert not any(known(world).loads for world in worlds)
