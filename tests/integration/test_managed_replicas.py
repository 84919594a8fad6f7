"""What is managed through an ingress reaches replicas that are attached later."""

from __future__ import annotations

import contextlib
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, ref
from tests.helpers.attached_replicas import AttachingFleet, fronts_of, ingress, until
from tests.helpers.attached_replicas import served as served_by
from tests.helpers.in_loop import in_loop
from tests.helpers.replicas import FACTS

from lorax_ingress.calls import IngressCalls
from lorax_router.service.adapters.managed import ManagedAdapters


def served(uri: str) -> AbstractAsyncContextManager[AdapterWorld]:
    return served_by(uri, by_admin=True)


def client_of(made: AttachingFleet) -> httpx.AsyncClient:
    calls = IngressCalls(made.fleet, {}, 1 << 20)
    transport = httpx.ASGITransport(app=calls)
    return httpx.AsyncClient(transport=transport, base_url="http://ingress")


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text


def known(world: AdapterWorld) -> ManagedAdapters:
    return ManagedAdapters.of(world.parts.adapters.registry.read())


def pinned(world: AdapterWorld) -> set[str]:
    return {each.ref.id for each in known(world).pins}


@in_loop
async def test_names_pins_and_loads_reach_a_replica_that_joins(tmp_path: Path) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "abc"}
    async with served(uris["a"]) as first, ingress() as made, client_of(made) as client:
        made.attach("a", uris["a"])
        await until(lambda: made.fleet.is_open)
        await post(client, "/v1/load_lora_adapter", lora_name="bard", lora_path="local:poet")
        await post(client, "/v1/adapters/load", adapter_id="pirate", adapter_source="local")
        await post(client, "/v1/adapters/load", adapter_id="monk", adapter_source="local")
        await post(client, "/v1/adapters/pin", adapter_id="monk", adapter_source="local")
        async with served(uris["b"]) as second:
            made.attach("b", uris["b"])
            await until(lambda: {each.id for each in known(second).loads} == {"bard", "pirate"})
            assert pinned(second) == pinned(first) == {"monk"}
            assert {each.name for each in known(second).names} == {"bard"}
            # It computes what the name stands for.
            assert second.parts.selections.aliases.stands_for("bard") == "local:poet"
            await post(client, "/v1/unload_lora_adapter", lora_name="bard")
            await post(client, "/v1/adapters/unload", adapter_id="pirate", adapter_source="local")
        async with served(uris["c"]) as third:
            made.attach("c", uris["c"])
            await until(lambda: pinned(third) == {"monk"})
            assert known(third).names == ()
            assert "pirate" not in {each.id for each in known(third).loads}


@in_loop
async def test_one_that_was_away_lets_go_of_what_was_taken_back_meanwhile(tmp_path: Path) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with (
        served(uris["a"]), ingress() as made, client_of(made) as client, adapter_world() as away,
    ):  # fmt: skip
        fronts = fronts_of(away, by_admin=True)
        await fronts.listen(uris["b"])
        for name, uri in uris.items():
            made.attach(name, uri)
        await until(lambda: len(made.fleet._views) == 2)
        await post(client, "/v1/load_lora_adapter", lora_name="bard", lora_path="local:poet")
        for name in ("pirate", "monk", "nun"):
            await post(client, "/v1/adapters/load", adapter_id=name, adapter_source="local")
        await post(client, "/v1/adapters/pin", adapter_id="monk", adapter_source="local")
        await fronts.close()
        await until(lambda: "b" not in made.fleet.replicas)
        await post(client, "/v1/unload_lora_adapter", lora_name="bard")
        await post(client, "/v1/adapters/unload", adapter_id="pirate", adapter_source="local")
        await post(client, "/v1/adapters/unpin", adapter_id="monk", adapter_source="local")
        assert known(away).names and pinned(away) == {"monk"}
        fronts = fronts_of(away, by_admin=True)
        await fronts.listen(uris["b"])
        await until(lambda: not known(away).names and not pinned(away))
        await until(lambda: {each.id for each in known(away).loads} == {"monk", "nun"})
        assert away.parts.selections.aliases.find("bard") is None
        pirate = away.catalog.names.find(ref("pirate"))
        assert pirate is None
        await fronts.close()


@in_loop
async def test_a_name_is_known_before_the_first_request_that_uses_it(tmp_path: Path) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with contextlib.AsyncExitStack() as stack, served(uris["b"]), ingress() as made:
        await stack.enter_async_context(served(uris["a"]))
        made.attach("a", uris["a"])
        await until(lambda: made.fleet.is_open)
        async with client_of(made) as client:
            await post(client, "/v1/load_lora_adapter", lora_name="bard", lora_path="local:poet")
        expected = await made.ask("bard")
        await stack.aclose()
        made.attach("b", uris["b"])
        assert await made.ask("bard") == expected


@in_loop
async def test_an_ingress_that_began_anew_learns_from_replicas(tmp_path: Path) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with served(uris["a"]) as first:
        async with ingress() as made, client_of(made) as client:
            made.attach("a", uris["a"])
            await until(lambda: made.fleet.is_open)
            await post(client, "/v1/adapters/load", adapter_id="pirate", adapter_source="local")
        async with ingress() as made, served(uris["b"]) as second:
            made.attach("a", uris["a"])
            await until(lambda: made.fleet.managed.book.all().loads)
            made.attach("b", uris["b"])
            await until(lambda: known(second).loads == known(first).loads)


@in_loop
async def test_what_cannot_be_had_there_is_told_and_the_rest_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with served(uris["a"]), served(uris["b"]) as second, ingress() as made:
        made.attach("a", uris["a"])
        await until(lambda: made.fleet.is_open)
        async with client_of(made) as client:
            for name in ("pirate", "monk"):
                await post(client, "/v1/adapters/load", adapter_id=name, adapter_source="local")
        second.sources.contents["pirate"] = RuntimeError("planted")
        made.attach("b", uris["b"])
        await until(lambda: {each.id for each in known(second).loads} == {"monk"})
    assert "local:pirate, which was loaded before, is not there" in caplog.text


@in_loop
async def test_a_replica_of_an_earlier_version_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = msgspec.structs.replace(FACTS, takes_managed=False)
    monkeypatch.setattr("tests.helpers.attached_replicas.FACTS", former)
    uri = f"unix:{tmp_path}/a"
    async with served(uri), ingress() as made, client_of(made) as client:
        made.attach("a", uri)
        await until(lambda: made.fleet.is_open)
        await post(client, "/v1/adapters/load", adapter_id="pirate", adapter_source="local")
        assert made.fleet.managed.book.all() == ManagedAdapters()
