"""What was named, pinned and loaded by hand is there again after the server's end, however it came."""

from __future__ import annotations

import asyncio
import contextlib
import logging
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
from lorax_router.service.adapters.aliases import Alias
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.managed import ManagedChange, ManagedKind
from lorax_router.service.adapters.registry import AdapterRegistry, Pin, Remembered
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
        await registry.loaded(ref("poet"))
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
        await registry.loaded(ref("poet"))
        registry.close()
        data = bytearray(path.read_bytes())
        data[1024:] = b"\xff" * (len(data) - 1024)
        path.write_bytes(data)
        registry = AdapterRegistry(str(path))
        assert registry.read().loads == ()
        await registry.loaded(ref("other"))
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
        hub = AdapterRef.of("hub", "org/private")
        await registry.pinned(hub, "acme", is_private=True)
        await registry.pinned(AdapterRef.of("hub", "org/open"), "acme", is_private=False)
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
                await manager.registry.unloaded(ref("two" if wanted == selection("one") else "one"))
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


def test_the_latest_loads_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorax_router.service.adapters.registry._MAX_LOADS", 3)

    async def scene() -> None:
        registry = AdapterRegistry(str(tmp_path / "file"))
        for number in range(5):
            await registry.loaded(ref(f"a{number}"))
        await registry.loaded(ref("a2"))
        assert [each.id for each in registry.read().loads] == ["a3", "a4", "a2"]
        await registry.named(Alias(name="n", target=selection("x")))
        await registry.named(Alias(name="n", target=selection("y")))
        assert [each.target.refs[0].id for each in registry.read().names] == ["y"]
        registry.close()

    asyncio.run(scene())


def change(name: str, at: float, kind: ManagedKind, **values: Any) -> ManagedChange:
    return ManagedChange(kind=kind, ref=ref(name), at=at, **values)


def test_the_later_of_what_was_done_here_and_elsewhere_is_true() -> None:
    """However often and in whichever order it is told."""

    async def scene() -> None:
        registry = AdapterRegistry()
        first, gone, again = (
            change("poet", at, ManagedKind.LOAD, holds=holds)
            for at, holds in ((10.0, True), (20.0, False), (30.0, True))
        )
        assert await registry.take([gone]) == [gone]
        assert await registry.take([first, gone]) == []
        assert registry.read().loads == ()
        assert not await registry.holds(first)
        assert await registry.take([again, gone]) == [again]
        assert registry.read().loads == (ref("poet"),)
        assert await registry.holds(first)
        assert await registry.changes() == [again]
        registry.close()

    asyncio.run(scene())


def test_what_is_done_here_is_later_than_what_a_clock_ahead_of_ours_said() -> None:
    async def scene() -> None:
        registry = AdapterRegistry()
        ahead = time.time() + 1000
        await registry.take([change("poet", ahead, ManagedKind.LOAD, holds=False)])
        await registry.loaded(ref("poet"))
        assert registry.read().loads == (ref("poet"),)
        await registry.take([change("poet", ahead + 1, ManagedKind.PIN)])
        await registry.unloaded(ref("poet"))
        assert registry.read() == Remembered()
        registry.close()

    asyncio.run(scene())


def test_what_is_unloaded_elsewhere_nobody_keeps() -> None:
    async def scene() -> None:
        registry = AdapterRegistry()
        own = change("poet", 10.0, ManagedKind.PIN, tenant="acme")
        later = change("poet", 30.0, ManagedKind.PIN)
        await registry.take([own, later])
        gone = change("poet", 20.0, ManagedKind.LOAD, holds=False)
        assert await registry.take([gone]) == [gone, replace(own, at=20.0, holds=False)]
        assert registry.read().pins == (Pin(ref("poet"), "", is_private=False),)
        registry.close()

    asyncio.run(scene())


def test_a_pin_of_the_options_is_not_taken_back_by_others() -> None:
    async def scene() -> None:
        registry = AdapterRegistry()
        gone = change("poet", 20.0, ManagedKind.PIN, holds=False)
        assert await registry.take([gone]) == []
        assert await registry.changes() == [gone]
        registry.close()

    asyncio.run(scene())


def test_only_so_much_of_what_is_past_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorax_router.service.adapters.registry._MAX_PAST", 2)

    async def scene() -> None:
        registry = AdapterRegistry()
        await registry.loaded(ref("kept"))
        for name in ("a", "b", "c"):
            await registry.unloaded(ref(name))
        await registry.reloaded(ref("d"))
        assert [each.ref.id for each in await registry.changes()] == ["kept", "c", "d"]
        registry.close()

    asyncio.run(scene())


def test_where_nothing_can_be_written_all_that_is_told_is_done(tmp_path: Path) -> None:
    async def scene() -> None:
        (tmp_path / "file").write_text("")
        registry = AdapterRegistry(str(tmp_path / "file" / "below a file"))
        told = [change("poet", 20.0, ManagedKind.LOAD)]
        assert await registry.take(told) == told
        assert await registry.holds(told[0])
        registry.close()

    asyncio.run(scene())
