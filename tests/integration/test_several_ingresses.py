"""Several ingresses over the same replicas: what one of them is told holds at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched
from tests.helpers.attached_replicas import AttachingFleet, fronts_of, ingress, until
from tests.helpers.in_loop import in_loop
from tests.helpers.managed_replicas import client_of, is_loaded, known, pinned, post, served

from lorax_router.fronts.attached import AttachedFronts
from lorax_router.service.adapters.managed import ManagedKind
from lorax_router.service.adapters.registry import Remembered

PIRATE: dict[str, Any] = {"adapter_id": "pirate", "adapter_source": "local"}


def uris_in(folder: Path, names: str) -> dict[str, str]:
    return {name: f"unix:{folder}/{name}" for name in names}


@contextlib.asynccontextmanager
async def attached(uris: dict[str, str]) -> AsyncIterator[AttachingFleet]:
    """An ingress that has attached to some replicas."""
    async with ingress() as made:
        for name, uri in uris.items():
            made.attach(name, uri)
        await until(lambda: len(made.fleet._views) == len(uris))
        yield made


def kinds(made: AttachingFleet) -> set[ManagedKind]:
    return {each.kind for each in made.fleet.managed.record.all()}


async def settled(world: AdapterWorld) -> None:
    """Wait until a replica has done all that it was told."""
    await asyncio.sleep(0.1)
    await until(lambda: not world.parts.adapters.directory._tasks)


@in_loop
async def test_what_one_was_told_another_one_tells_a_replica_that_joins(tmp_path: Path) -> None:
    """Though it has never heard of it: what is attached to it has."""
    uris = uris_in(tmp_path, "ab")
    here = {"a": uris["a"]}
    async with served(uris["a"]), attached(here) as one, attached(here) as other:
        async with client_of(one) as client:
            await post(client, "/v1/load_lora_adapter", lora_name="bard", lora_path="local:poet")
            await post(client, "/v1/adapters/load", pin=True, **PIRATE)
        assert other.fleet.managed.record.all() == []
        async with served(uris["b"]) as joined:
            other.attach("b", uris["b"])
            await until(lambda: pinned(joined) == {"pirate"} and is_loaded(joined, "pirate"))
            assert {each.name for each in known(joined).names} == {"bard"}


@in_loop
async def test_what_was_taken_back_at_one_no_other_brings_back(tmp_path: Path) -> None:
    uris = uris_in(tmp_path, "ab")
    here = {"a": uris["a"]}
    async with served(uris["a"]), attached(here) as one, attached(here) as other:
        async with client_of(other) as client:
            await post(client, "/v1/load_lora_adapter", lora_name="bard", lora_path="local:poet")
            await post(client, "/v1/adapters/load", pin=True, **PIRATE)
        assert len(other.fleet.managed.record.all()) == 3
        async with client_of(one) as client:
            await post(client, "/v1/unload_lora_adapter", lora_name="bard")
            await post(client, "/v1/adapters/unload", **PIRATE)
        async with served(uris["b"]) as joined:
            other.attach("b", uris["b"])
            await until(lambda: kinds(other) == {ManagedKind.UNLOAD})
            await until(lambda: known(joined) == Remembered())
            await settled(joined)
            assert joined.parts.selections.aliases.find("bard") is None
            assert not any(each.is_pinned for each in joined.catalog.names)


@in_loop
async def test_what_was_given_again_at_another_one_is_not_taken_from_a_replica(
    tmp_path: Path,
) -> None:
    uris = uris_in(tmp_path, "ab")
    here = {"a": uris["a"]}
    async with served(uris["a"]), attached(here) as one, attached(here) as other:
        async with client_of(one) as first, client_of(other) as second:
            await post(first, "/v1/adapters/load", **PIRATE)
            await post(first, "/v1/adapters/unload", **PIRATE)
            await post(second, "/v1/adapters/load", **PIRATE)
        async with served(uris["b"]) as joined:
            # By the one that only knows of its end.
            one.attach("b", uris["b"])
            await until(lambda: is_loaded(joined, "pirate"))
            assert [each.id for each in known(joined).loads] == ["pirate"]


@in_loop
async def test_a_call_with_which_an_ingress_died_reaches_the_others_with_its_successor(
    tmp_path: Path,
) -> None:
    uris = uris_in(tmp_path, "ab")
    async with served(uris["a"]) as first, served(uris["b"]) as second:
        # As far as it came.
        assert (await first.post("load", adapter_id="pirate")).status_code == 200
        async with ingress() as made:
            made.attach("b", uris["b"])
            await until(lambda: made.fleet.is_open)
            made.attach("a", uris["a"])
            await until(lambda: is_loaded(second, "pirate"))
            assert [each.id for each in known(second).loads] == ["pirate"]


@in_loop
async def test_several_that_tell_the_same_have_it_done_once(tmp_path: Path) -> None:
    uris = uris_in(tmp_path, "ab")
    async with served(uris["a"]) as first, served(uris["b"]) as second:
        for name in ("pirate", "monk"):
            assert (await first.post("load", adapter_id=name)).status_code == 200
        async with attached(uris), attached(uris), attached(uris):
            await until(lambda: is_loaded(second, "pirate") and is_loaded(second, "monk"))
            await settled(second)
        assert sorted(each.ref.id for each in second.shard.queries) == ["monk", "pirate"]
        # Those who had it hear nothing new.
        assert sorted(each.ref.id for each in first.shard.queries) == ["monk", "pirate"]


@in_loop
async def test_homes_and_lists_are_the_same_at_all(tmp_path: Path) -> None:
    uris = uris_in(tmp_path, "abc")
    async with (
        served(uris["a"]), served(uris["b"]), served(uris["c"]),
        attached(uris) as one, attached(dict(reversed(uris.items()))) as other,
    ):  # fmt: skip
        for number in range(50):
            name = f"local:{number}"
            homes = [made.fleet._router.homes(name, 0.0) for made in (one, other)]
            assert homes[0] == homes[1]
            assert homes[0]
        async with client_of(one) as first, client_of(other) as second:
            await post(first, "/v1/adapters/load", **PIRATE)
            lists = [(await each.get("/v1/adapters")).json() for each in (first, second)]
            assert lists[0]["adapters"][0]["adapter_id"] == "pirate"
            assert [[each["adapter_id"] for each in one["adapters"]] for one in lists] == [
                ["pirate"], ["pirate"],
            ]  # fmt: skip


@in_loop
async def test_what_tenants_got_counts_once_whichever_ingress_tells(tmp_path: Path) -> None:
    """Also after one of them began anew."""
    uris = uris_in(tmp_path, "ab")
    async with adapter_world() as first, adapter_world() as second:
        worlds, fronts = (first, second), (fronts_of(first), fronts_of(second))
        for uri, each in zip(uris.values(), fronts, strict=True):
            await each.listen(uri)
        async with attached(uris) as one:
            for _ in range(2):
                async with attached(uris) as other:
                    asked = [made.ask() for made in (one, other) for _ in range(8)]
                    await asyncio.gather(*asked)
                    await until(lambda: told_of(worlds, fronts))
        assert sum(sum(world.parts.engine.service_here().values()) for world in worlds) > 0
        for each in fronts:
            await each.close()


def told_of(worlds: Sequence[AdapterWorld], fronts: Sequence[AttachedFronts]) -> bool:
    """Whether each replica knows what the other one gave, and not more."""
    given = [world.parts.engine.service_here() for world in worlds]
    known = [each.elsewhere.known() for each in fronts]
    assert all(
        known[1 - at].get(tenant, 0.0) <= given[at][tenant] for at in (0, 1) for tenant in given[at]
    )
    return known == [*reversed(given)]


@pytest.mark.parametrize("kind", [ManagedKind.PIN, ManagedKind.LOAD])
@in_loop
async def test_what_is_taken_back_while_a_replica_brings_it_goes_again(
    tmp_path: Path, kind: ManagedKind
) -> None:
    uris = uris_in(tmp_path, "ab")
    is_pin = kind is ManagedKind.PIN
    async with served(uris["a"]), attached({"a": uris["a"]}) as made, client_of(made) as client:
        await post(client, "/v1/adapters/load", pin=is_pin, **PIRATE)
        async with served(uris["b"]) as joined:
            coming = joined.sources.contents["pirate"] = asyncio.get_running_loop().create_future()
            made.attach("b", uris["b"])
            await until(lambda: joined.shard.queries)
            await post(client, f"/v1/adapters/{'unpin' if is_pin else 'unload'}", **PIRATE)
            coming.set_result(fetched("pirate"))
            await settled(joined)
            assert not known(joined).loads
            assert not pinned(joined)
            assert not any(each.is_pinned for each in joined.catalog.names)
