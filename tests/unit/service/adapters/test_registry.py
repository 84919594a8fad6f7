"""What was named, pinned and loaded by hand is there again after the server's end, however it came."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sqlite3
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, ref, selection

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_router.adapter_setup import bring_back, preload, restore_names
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.managed import (
    MAX_LOADS,
    ManagedChange,
    ManagedKind,
    Stamp,
    call_stamp,
)
from lorax_router.service.adapters.registry import AdapterRegistry, Remembered
from lorax_router.service.callers import Caller, Quotas

TENANT = Caller(tenant="acme", quotas=Quotas(pins=2))


@contextlib.asynccontextmanager
async def server(
    path: Path, *, brings_back: bool = True, **config: object
) -> AsyncIterator[AdapterWorld]:
    """A server that knows what is in a file, and has brought it back if that is wanted."""
    async with adapter_world(adapter_registry=str(path), **config) as world:
        restore_names(world.parts.adapters.registry, world.parts.selections.aliases)
        await preload(world.parts.adapters, world.parts.preloads)
        if brings_back:
            await bring_back(world.parts.adapters)
        yield world


async def name(world: AdapterWorld, said: str, target: str, token: str | None = None) -> None:
    manager, aliases = world.parts.adapters, world.parts.selections.aliases
    await manager.name(aliases.make(said, selection(target, token)))


def done(registry: AdapterRegistry, kind: ManagedKind, name: str, **facts: Any) -> ManagedChange:
    return ManagedChange(kind=kind, ref=ref(name), stamp=registry.stamp(), **facts)


async def num_tokens(world: AdapterWorld, name: str) -> int:
    """How many tokens an answer by a name has."""
    (sequence,) = (await world.generate(name, adapter_source=None)).sequences
    return len(sequence.tokens.ids)


def test_names_pins_and_loads_are_there_again(tmp_path: Path) -> None:
    async def scene() -> None:
        path = tmp_path / "servers" / "80.sqlite3"
        async with server(path) as world:
            manager = world.parts.adapters
            await name(world, "poet", "org/poet")
            await manager.load(selection("kept"), pin=True)
            await manager.load(selection("theirs"))
            await manager.pin(selection("theirs"), TENANT)
            await manager.load(selection("loaded"))
        async with server(path) as world:
            listed = await world.list()
            assert listed.keys() == {"poet", "kept", "theirs", "loaded"}
            assert {each["state"] for each in listed.values()} == {"resident"}
            assert {key for key, each in listed.items() if each["pinned"]} == {"kept", "theirs"}
            assert world.catalog.names.find(ref("theirs")).pinned_by == {"acme"}
            assert await num_tokens(world, "poet") == 3

    asyncio.run(scene())


def test_a_name_answers_before_anything_is_brought_back(tmp_path: Path) -> None:
    async def scene() -> None:
        async with server(tmp_path / "file") as world:
            await name(world, "poet", "org/poet")
        async with server(tmp_path / "file", brings_back=False) as world:
            assert await num_tokens(world, "poet") == 3

    asyncio.run(scene())


def test_what_was_taken_back_stays_away(tmp_path: Path) -> None:
    async def scene() -> None:
        async with server(tmp_path / "file") as world:
            manager = world.parts.adapters
            await name(world, "poet", "org/poet")
            for each in ("one", "two"):
                await manager.load(selection(each), pin=True)
            await manager.unpin(selection("one"))
            await manager.unload(selection("two"))
            await manager.unload(world.parts.selections.aliases.find("poet").selection)
        registry = AdapterRegistry(str(tmp_path / "file"))
        remembered = registry.read()
        assert (remembered.names, remembered.pins, remembered.loads) == ((), (), ())
        registry.close()

    asyncio.run(scene())


def test_no_token_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The name is, and the log says what it lacks."""

    async def scene() -> None:
        async with server(tmp_path / "file") as world:
            await name(world, "secret", "org/private", token="hf_private_token")
        assert b"hf_private_token" not in (tmp_path / "file").read_bytes()
        async with server(tmp_path / "file", brings_back=False) as world:
            assert world.parts.selections.aliases.find("secret").target.token is None

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())
    assert "whose token is not kept" in caplog.text


@pytest.mark.parametrize("is_there", [False, True])
def test_others_on_this_machine_cannot_read_it(tmp_path: Path, is_there: bool) -> None:
    """Names of private adapters are in it, wherever the operator puts it."""
    path = tmp_path / "file"
    tmp_path.chmod(0o755)
    if is_there:
        path.touch(0o644)

    async def scene() -> None:
        async with server(path) as world:
            await name(world, "secret", "org/private", token="hf_private_token")

    asyncio.run(scene())
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.glob("file*")}
    assert modes["file"] == 0o600
    assert set(modes.values()) == {0o600}


def test_the_configuration_goes_before_what_is_remembered(tmp_path: Path) -> None:
    async def scene() -> None:
        async with server(tmp_path / "file") as world:
            await name(world, "poet", "org/old")
        async with server(tmp_path / "file", adapter_aliases=["poet=local:org/new"]) as world:
            assert world.parts.selections.aliases.find("poet").target.refs == (ref("org/new"),)
        # What the configuration wants is no matter of what is remembered.
        registry = AdapterRegistry(str(tmp_path / "file"))
        assert [each.name for each in registry.read().names] == ["poet"]
        assert not registry.read().pins
        registry.close()

    asyncio.run(scene())


def test_an_adapter_that_is_gone_is_told_of_and_keeps_no_other_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        async with server(tmp_path / "file") as world:
            for each in ("gone", "there"):
                await world.parts.adapters.load(selection(each), pin=True)
        async with server(tmp_path / "file", brings_back=False) as world:
            world.sources.contents["gone"] = AdapterUnavailableError(
                Reason.NOT_FOUND, "no such folder"
            )
            await bring_back(world.parts.adapters)
            assert (await world.list()).keys() >= {"there"}

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())
    assert "local:gone, which was loaded before, is not there: no such folder" in caplog.text


@pytest.mark.parametrize("damage", [b"no database at all" * 100, None])
def test_a_file_that_cannot_be_read_is_put_aside(tmp_path: Path, damage: bytes | None) -> None:
    """Garbage, or a file of a version that is not known."""

    async def scene() -> None:
        path = tmp_path / "file"
        if damage is not None:
            path.write_bytes(damage)
        else:
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.executescript("CREATE TABLE x (y); PRAGMA user_version = 99;")
        before = path.read_bytes()
        async with server(path) as world:
            await name(world, "poet", "org/poet")
        assert Path(f"{path}.damaged").read_bytes() == before
        async with server(path) as world:
            assert world.parts.selections.aliases.find("poet") is not None

    asyncio.run(scene())


def test_a_file_that_is_locked_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may be writing it."""
    path = tmp_path / "file"

    async def fill() -> None:
        registry = AdapterRegistry(str(path))
        await registry.put(done(registry, ManagedKind.LOAD, "poet"))
        registry.close()

    asyncio.run(fill())
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.01}))
    with contextlib.closing(connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        registry = AdapterRegistry(str(path))
        assert registry.read().loads == ()
        registry.close()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    registry = AdapterRegistry(str(path))
    assert [each.id for each in registry.read().loads] == ["poet"]
    registry.close()


def test_a_file_that_was_put_aside_is_replaced_by_one_that_is_kept(tmp_path: Path) -> None:
    """By whoever found it damaged, at once."""
    path = tmp_path / "file"

    async def scene() -> None:
        registry = AdapterRegistry(str(path))
        await registry.put(done(registry, ManagedKind.LOAD, "poet"))
        registry.close()
        data = bytearray(path.read_bytes())
        data[1024:] = b"\xff" * (len(data) - 1024)
        path.write_bytes(data)
        registry = AdapterRegistry(str(path))
        assert registry.read().loads == ()
        await registry.put(done(registry, ManagedKind.LOAD, "other"))
        registry.close()
        registry = AdapterRegistry(str(path))
        assert [each.id for each in registry.read().loads] == ["other"]
        registry.close()

    asyncio.run(scene())


def test_a_tenant_gets_no_adapter_by_the_server_s_own_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its private ones are not pinned again, and of others no token goes along."""
    monkeypatch.setenv("HF_TOKEN", "the-server-s-own")

    async def scene() -> None:
        registry = AdapterRegistry(str(tmp_path / "file"))
        for said in ("private", "open"):
            is_private = said == "private"
            pinned = done(registry, ManagedKind.PIN, said, tenant="acme", is_private=is_private)
            await registry.put(replace(pinned, ref=AdapterRef.of("hub", f"org/{said}")))
        registry.close()
        async with server(tmp_path / "file") as world:
            assert [query.ref.id for query in world.shard.queries] == ["org/open"]
            assert [query.token for query in world.shard.queries] == [None]

    asyncio.run(scene())


def test_what_is_let_go_before_its_turn_does_not_come_back(tmp_path: Path) -> None:
    async def scene() -> None:
        async with server(tmp_path / "file") as world:
            for each in ("one", "two"):
                await world.parts.adapters.load(selection(each), pin=True)
        async with server(tmp_path / "file", brings_back=False) as world:
            manager = world.parts.adapters
            load = manager.load

            async def load_and_take_back(
                wanted: AdapterSelection, *args: Any, **kwargs: Any
            ) -> Any:
                other = "two" if wanted == selection("one") else "one"
                registry = manager.registry
                registry.take([done(registry, ManagedKind.UNLOAD, other)])
                return await load(wanted, *args, **kwargs)

            manager.load = load_and_take_back  # type: ignore[method-assign]
            await bring_back(manager)
            assert len(await world.list()) == 1

    asyncio.run(scene())


def test_a_file_that_cannot_be_written_costs_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        (tmp_path / "file").write_text("")
        async with server(tmp_path / "file" / "below a file") as world:
            await name(world, "poet", "org/poet")
            assert await num_tokens(world, "poet") == 3

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())
    assert "is forgotten when" in caplog.text


def test_what_is_known_no_more_leaves_the_file(tmp_path: Path) -> None:
    async def scene() -> None:
        registry = AdapterRegistry(str(tmp_path / "file"))
        for number in range(MAX_LOADS + 2):
            registry.take([done(registry, ManagedKind.LOAD, f"a{number}")])
        await registry.put(
            done(registry, ManagedKind.LOAD, "a1"), done(registry, ManagedKind.PIN, "a1")
        )
        await registry.put(done(registry, ManagedKind.UNLOAD, "a5"))
        registry.close()
        again = AdapterRegistry(str(tmp_path / "file"))
        assert again.record.all() == registry.record.all()
        assert again.record.digest == registry.record.digest
        loads = [each.id for each in again.read().loads]
        assert loads == [f"a{each}" for each in range(3, MAX_LOADS + 2) if each != 5] + ["a1"]
        again.close()

    asyncio.run(scene())


def test_what_is_written_at_once_is_as_the_last_had_it(tmp_path: Path) -> None:
    """Whichever of several that write comes to the disk first."""

    async def scene() -> None:
        registry = AdapterRegistry(str(tmp_path / "file"))
        kinds = (ManagedKind.LOAD, ManagedKind.UNLOAD) * 10
        changes = [done(registry, kind, "poet") for kind in kinds]
        random.Random(3).shuffle(changes)
        await asyncio.gather(*(registry.put(each) for each in changes))
        registry.close()
        again = AdapterRegistry(str(tmp_path / "file"))
        assert [each.kind for each in again.record.all()] == [ManagedKind.UNLOAD]
        again.close()

    asyncio.run(scene())


def test_what_is_done_here_is_later_than_what_a_clock_ahead_of_ours_said() -> None:
    registry = AdapterRegistry()
    ahead = time.time() + 1000
    told = ManagedChange(kind=ManagedKind.UNLOAD, ref=ref("poet"), stamp=Stamp(ahead, "theirs"))
    registry.take([told])
    registry.take([done(registry, ManagedKind.LOAD, "poet")])
    assert registry.read().loads == (ref("poet"),)
    registry.take([replace(told, kind=ManagedKind.PIN, stamp=Stamp(ahead + 1))])
    registry.take([done(registry, ManagedKind.UNLOAD, "poet")])
    assert registry.read() == Remembered()


def test_a_call_that_came_by_an_ingress_has_its_stamp() -> None:
    registry, given = AdapterRegistry(), Stamp(20.0, "theirs")
    own = [registry.stamp() for _ in range(3)]
    assert own == sorted({*own})
    token = call_stamp.set(given)
    assert registry.stamp() == given
    call_stamp.reset(token)


def test_where_nothing_can_be_written_what_is_told_is_known(tmp_path: Path) -> None:
    async def scene() -> None:
        (tmp_path / "file").write_text("")
        registry = AdapterRegistry(str(tmp_path / "file" / "below a file"))
        await registry.put(done(registry, ManagedKind.LOAD, "poet"))
        assert registry.read().loads == (ref("poet"),)
        registry.close()

    asyncio.run(scene())
