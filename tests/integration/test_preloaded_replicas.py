"""A replica that joins has what it becomes a home of before a request asks it for that."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, ref
from tests.helpers.attached_replicas import AttachingFleet, ingress, request, served, until
from tests.helpers.in_loop import in_loop
from tests.helpers.replicas import FACTS

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_router.service.adapters.preloading import Preloader
from lorax_router.service.adapters.registry import Remembered
from lorax_router.service.callers import Caller

NAMES = [f"adapter{number}" for number in range(4)]


def resident(world: AdapterWorld) -> set[str]:
    """The adapters on a world's shards."""
    entries = world.catalog.by_handle.values()
    return {
        each.selection.refs[0].id for each in entries
        if world.parts.engine.is_adapter_resident(each.handle)
    }  # fmt: skip


async def ask_for_all(made: AttachingFleet, **params: object) -> None:
    for name in NAMES * 2:
        await made.service.generate(request(name, **params))


def moved_to(made: AttachingFleet, name: str) -> set[str]:
    now = asyncio.get_running_loop().time()
    keys = {each: f"local:{each}" for each in NAMES}
    return {each for each in NAMES if made.fleet._router.homes(keys[each], now)[0] == name}


@in_loop
async def test_a_replica_that_joins_has_what_it_is_home_of_before_any_request(
    tmp_path: Path,
) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with served(uris["a"]), served(uris["b"]) as second, ingress() as made:
        made.attach("a", uris["a"])
        await until(lambda: made.fleet.is_open)
        await ask_for_all(made)
        made.attach("b", uris["b"])
        await until(lambda: resident(second))
        await until(lambda: resident(second) >= moved_to(made, "b"))
        assert moved_to(made, "b")
        assert {replica for replica, _ in made.fleet._metrics._routed} == {"a"}
        assert made.fleet._metrics._preloads["b"] == len(resident(second))
        # It is nothing that anybody managed by hand.
        assert second.parts.adapters.registry.read() == Remembered()


@in_loop
async def test_a_replica_of_an_earlier_version_is_told_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = msgspec.structs.replace(FACTS, takes_preloads=False)
    monkeypatch.setattr("tests.helpers.attached_replicas.FACTS", former)
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with served(uris["a"]), served(uris["b"]) as second, ingress() as made:
        made.attach("a", uris["a"])
        await until(lambda: made.fleet.is_open)
        await ask_for_all(made)
        made.attach("b", uris["b"])
        await until(lambda: len(made.fleet._views) == 2)
        await asyncio.sleep(0.1)
        assert resident(second) == set()


@in_loop
async def test_what_is_asked_for_with_a_token_is_not_preloaded(tmp_path: Path) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with served(uris["a"]), served(uris["b"]) as second, ingress() as made:
        made.attach("a", uris["a"])
        await until(lambda: made.fleet.is_open)
        await ask_for_all(made, adapter_source="hub", api_token="secret")
        made.attach("b", uris["b"])
        await until(lambda: len(made.fleet._views) == 2)
        await asyncio.sleep(0.1)
        assert resident(second) == set() and second.sources.queries == []
        # The token of a caller's key is one, too.
        owner = Caller(tenant="acme", api_token="secret")
        asked = replace(request("adapter0", adapter_source="hub"), caller=owner)
        assert made.fleet._adapter(asked) == ("hub:adapter0", False)
        # The same names without a token are another matter.
        await ask_for_all(made, adapter_source="hub")
        assert all(each in made.fleet._names for each in (f"hub:{name}" for name in NAMES))


@in_loop
async def test_preloading_takes_free_slots_only_and_brings_no_token() -> None:
    async with adapter_world(max_active_adapters=3) as world:
        await world.generate("poet")
        preloads = Preloader(world.parts.adapters.directory, world.parts.engine)
        world.sources.contents["broken"] = AdapterUnavailableError(Reason.NOT_FOUND, "planted")
        preloads.take([ref("broken"), ref("monk"), ref("pirate"), ref("nun"), ref("monk")])
        await until(lambda: len(resident(world)) == 3)
        await asyncio.sleep(0.05)
        assert resident(world) == {"poet", "monk", "pirate"}
        queries = world.sources.queries
        assert all(query.token is None for query in queries)
        # Where nothing is free, sources are not even asked.
        assert "nun" not in {query.ref.id for query in queries}
        await preloads.close()
