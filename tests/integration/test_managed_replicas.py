"""What is managed through ingresses reaches all replicas, those that were away or come later too."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched, ref, selection
from tests.helpers.attached_replicas import AttachingFleet, fronts_of, ingress, until
from tests.helpers.in_loop import in_loop
from tests.helpers.managed_replicas import client_of, is_loaded, known, pinned, post, served
from tests.helpers.replicas import FACTS


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
            await until(lambda: {*known(second).loads} == {*known(first).loads})
            assert {each.id for each in known(second).loads} == {"bard", "pirate", "monk"}
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
            await until(lambda: made.fleet.managed.record.all())
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
        await until(lambda: is_loaded(second, "monk"))
    assert "local:pirate, which was loaded before, is not there" in caplog.text


@in_loop
async def test_a_replica_of_an_earlier_version_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = msgspec.structs.replace(FACTS, takes_changes=False)
    monkeypatch.setattr("tests.helpers.attached_replicas.FACTS", former)
    uri = f"unix:{tmp_path}/a"
    async with served(uri), ingress() as made, client_of(made) as client:
        made.attach("a", uri)
        await until(lambda: made.fleet.is_open)
        await post(client, "/v1/adapters/load", adapter_id="pirate", adapter_source="local")
        assert made.fleet.managed.record.all() == []


@contextlib.asynccontextmanager
async def absence(
    folder: Path,
) -> AsyncIterator[tuple[AdapterWorld, AdapterWorld, httpx.AsyncClient, Callable[[], Any]]]:
    """A replica that stays, one that is away, a client, and what has that one come back alone."""
    uris = {name: f"unix:{folder}/{name}" for name in "ab"}
    async with contextlib.AsyncExitStack() as stack, adapter_world() as away, ingress() as made:
        fronts = fronts_of(away, by_admin=True)
        await fronts.listen(uris["b"])
        stays = await stack.enter_async_context(served(uris["a"]))
        for name, uri in uris.items():
            made.attach(name, uri)
        await until(lambda: len(made.fleet._views) == 2)
        client = await stack.enter_async_context(client_of(made))
        await post(client, "/v1/load_lora_adapter", lora_name="bard", lora_path="local:poet")
        for world in (stays, away):
            await world.generate("pirate")
        await fronts.close()
        await until(lambda: "b" not in made.fleet.replicas)
        fronts = fronts_of(away, by_admin=True)

        async def come_back() -> AttachingFleet:
            await fronts.listen(uris["b"])
            await until(lambda: "b" in made.fleet.replicas)
            await stack.aclose()
            return made

        yield stays, away, client, come_back
        await fronts.close()


def replace_source(*worlds: AdapterWorld) -> None:
    for world in worlds:
        world.sources.contents["pirate"] = fetched("another pirate")


@pytest.mark.parametrize("verb", ["reload", "load"])
@in_loop
async def test_what_was_asked_for_anew_is_so_by_one_that_was_away(
    tmp_path: Path, verb: str
) -> None:
    """Though only requests had brought it there, and its answer held for long."""
    async with absence(tmp_path) as (stays, away, client, come_back):
        replace_source(stays, away)
        await post(client, f"/v1/adapters/{verb}", adapter_id="pirate", adapter_source="local")
        expected = (await stays.generate("pirate", 5)).sequences[0].tokens.ids
        assert (await away.generate("pirate", 5)).sequences[0].tokens.ids != expected
        made = await come_back()
        assert await made.ask("pirate") == [*expected]


@pytest.mark.parametrize("is_elsewhere", [True, False])
@in_loop
async def test_what_requests_brought_is_let_go_where_it_was_unloaded_meanwhile(
    tmp_path: Path, is_elsewhere: bool
) -> None:
    """Also where only the one that was away had it."""
    async with absence(tmp_path) as (stays, away, client, come_back):
        replace_source(stays, away)
        name, body = "pirate", {"adapter_id": "pirate", "adapter_source": "local"}
        if not is_elsewhere:
            name, body = "monk", {"adapter_id": "monk", "adapter_source": "local"}
            await away.generate("monk")
        answer = await client.post("/v1/adapters/unload", json=body)
        assert answer.status_code == (200 if is_elsewhere else 404)
        assert is_loaded(away, name)
        made = await come_back()
        await until(lambda: away.catalog.names.find(ref(name)) is None)
        assert await made.ask(name) == [*(await away.generate(name, 5)).sequences[0].tokens.ids]


@in_loop
async def test_a_name_that_stands_for_another_one_does_so_where_it_was_asked_before(
    tmp_path: Path,
) -> None:
    async with absence(tmp_path) as (stays, away, client, come_back):
        for world in (stays, away):
            await world.generate("bard", adapter_source=None)
        body = {"lora_name": "bard", "lora_path": "local:pirate", "load_inplace": True}
        await post(client, "/v1/load_lora_adapter", **body)
        expected = (await stays.generate("pirate", 5)).sequences[0].tokens.ids
        made = await come_back()
        assert await made.ask("bard", adapter_source=None) == [*expected]


@in_loop
async def test_what_was_brought_anew_after_it_was_unloaded_stays(tmp_path: Path) -> None:
    """By one that was with all others then, and was cut off only later."""
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with served(uris["a"]) as first, served(uris["b"]) as second:
        async with ingress() as made, client_of(made) as client:
            for name, uri in uris.items():
                made.attach(name, uri)
            await until(lambda: len(made.fleet._views) == 2)
            await second.generate("pirate")
            # One that has it is enough.
            await post(client, "/v1/adapters/unload", adapter_id="pirate", adapter_source="local")
            assert not is_loaded(second, "pirate")
            await asyncio.sleep(0.05)
            await second.generate("pirate")
        handle = second.handle("pirate")
        async with ingress() as made:
            for name, uri in uris.items():
                made.attach(name, uri)
            await until(lambda: len(made.fleet._views) == 2)
            await until(lambda: made.fleet.managed.record.all())
            assert await second.generate("pirate")
        assert second.handle("pirate") == handle
        assert not known(first).loads


@in_loop
async def test_a_name_keeps_its_token_where_others_gave_it_a_moment_later(tmp_path: Path) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with served(uris["a"]) as first, served(uris["b"]) as second:
        for world in (first, second):
            aliases = world.parts.selections.aliases
            await world.parts.adapters.name(aliases.make("bard", selection("poet", "t0ken")))
        async with ingress() as made:
            made.attach("b", uris["b"])
            await until(lambda: made.fleet.managed.record.all())
            made.attach("a", uris["a"])
            (later,) = known(second).names
            await until(lambda: known(first).names == (later,))
            bard = first.parts.selections.aliases.find("bard")
            assert bard is not None
            assert bard.target.token == "t0ken"
