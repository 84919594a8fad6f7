"""Names and adapters that nobody uses do not fill the memory."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.adapter_world import (
    Sources,
    directory_with,
    fetched,
    selection,
)
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import (
    AdapterUnavailableError,
    Reason,
    refused,
)
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.adapters.listing import ListQuery
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.shards.fake.shard import FakeShard


async def everything(manager: AdapterManager, token: str | None = None) -> list[str]:
    """All ids that a caller can list."""
    found: list[str] = []
    cursor = None
    while True:
        page = await manager.pages.listing(ListQuery(limit=50, cursor=cursor), token)
        found += [each["adapter_id"] for each in page["adapters"]]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


async def use(directory: AdapterDirectory, *selections: AdapterSelection) -> None:
    for each in selections:
        (await directory.acquire(each)).release()


@in_loop
async def test_names_that_are_never_seen_again_do_not_fill_the_memory():
    shard = FakeShard()
    shard.on_fetch = sources = Sources()
    async with directory_with(shard, max_names=64) as (directory, manager):
        sources.contents |= {f"n{number}": fetched("x") for number in range(300)}
        await use(directory, *(selection(f"n{number}") for number in range(300)))
        assert await everything(manager) == sorted(f"n{number}" for number in range(236, 300))
        # What leads nowhere goes before what leads somewhere.
        for number in range(300):
            sources.contents[f"m{number}"] = refused("no")
            with pytest.raises(AdapterUnavailableError):
                await use(directory, selection(f"m{number}"))
            assert len(directory.catalog.names) <= 64
        assert len([name for name in await everything(manager) if name[0] == "n"]) == 63
        # Nor do tokens that nobody lets in.
        sources.contents["m"] = AdapterUnavailableError(Reason.NO_ACCESS, "no")
        for number in range(300):
            with pytest.raises(AdapterUnavailableError):
                await use(directory, selection("m", f"token {number}"))
            assert len(directory.catalog.names) <= 64
        assert len(await everything(manager)) == 63


@in_loop
async def test_names_that_are_waited_for_held_or_pinned_are_not_forgotten():
    shard = FakeShard()
    shard.on_fetch = sources = Sources()
    async with directory_with(shard, max_names=8) as (directory, manager):
        future = asyncio.get_running_loop().create_future()
        sources.contents["slow"] = future
        waiting = asyncio.create_task(directory.acquire(selection("slow")))
        lease = await directory.acquire(selection("held"))
        await manager.load(selection("kept"), pin=True)
        await use(directory, *(selection(f"n{number}") for number in range(100)))
        # Replaced ones leave the shards in tasks of their own.
        await until(lambda: len(directory.catalog.by_handle) == 7)
        found = await everything(manager)
        assert {"slow", "held", "kept"} < {*found}
        assert len(found) == 8
        future.set_result(fetched("slow"))
        (await waiting).release()
        lease.release()


@in_loop
async def test_adapters_that_are_never_used_again_do_not_fill_the_memory():
    shard = FakeShard()
    async with directory_with(shard, max_idle=16) as (directory, manager):
        await manager.load(selection("kept"), pin=True)
        await manager.load(selection("resident"))
        await use(directory, *(selection(f"n{number}") for number in range(100)))
        await until(lambda: len(directory.catalog.by_handle) <= 16)
        # What was used last is still known, and what is on the shards.
        last = sorted(f"n{number}" for number in range(86, 100))
        assert await everything(manager) == ["kept", *last, "resident"]
        # And whatever was forgotten can be had again.
        await use(directory, selection("n0"))
        assert "n0" in await everything(manager)
