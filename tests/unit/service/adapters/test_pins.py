"""Pins: they stay with the name, and give way in words."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.adapter_world import (
    adapter_world,
    fetched,
    selection,
)
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.errors import AdapterNotLoadedError
from lorax_contract.step import AdapterHandle


@in_loop
async def test_reload_takes_a_pin_along_also_when_only_one_may_be_pinned():
    async with adapter_world(max_active_adapters=2) as world:
        await world.parts.adapters.load(selection("a"), pin=True)
        world.shard.step_delay_s = 0.001
        stream = await world.stream("a", 100)
        same = await world.parts.adapters.reload(selection("a"))
        assert (same["changed"], same["pinned"]) == (False, True)
        world.sources.contents["a"] = fetched("new", version="2")
        answer = await world.parts.adapters.reload(selection("a"))
        assert (answer["changed"], answer["version"]) == (True, "2")
        assert (answer["state"], answer["pinned"]) == ("resident", True)
        assert world.table[AdapterHandle(2)].is_pinned
        assert not world.table[AdapterHandle(1)].is_pinned
        assert await world.finish(stream) == 100
        await world.gone(AdapterHandle(1))


@in_loop
async def test_a_request_that_finds_a_pinned_name_replaced_takes_the_pin_along_too():
    async with adapter_world(max_active_adapters=2) as world:
        world.sources.contents["a"] = fetched("old", valid_s=0)
        await world.parts.adapters.load(selection("a"), pin=True)
        world.sources.contents["a"] = fetched("new", valid_s=0)
        await world.generate("a")
        await world.gone(AdapterHandle(1))
        assert world.table[world.handle("a")].is_pinned
        assert (await world.list())["a"]["pinned"]


@in_loop
async def test_a_pin_that_no_longer_fits_is_dropped_and_the_request_is_served():
    async with adapter_world(max_active_adapters=3) as world:
        room = 1 << 30  # what FakeShard has for adapters
        world.sources.contents["a"] = fetched("old", valid_s=0, device_bytes=room // 4)
        world.shard.on_prepare = lambda handle, content: None
        await world.parts.adapters.load(selection("a"), pin=True)
        world.sources.contents["b"] = fetched("b", device_bytes=room // 2)
        stuck = asyncio.Event()
        world.shard.on_prepare = lambda handle, content: stuck.wait()
        waiting = world.task("b")
        await until(lambda: any(record.num_waiting for record in world.table.snapshot()))
        world.sources.contents["a"] = fetched("new", valid_s=0, device_bytes=room * 3 // 4)
        replaced = world.task("a")
        await until(lambda: len(world.table.snapshot()) >= 2 and world.handle("a") == 3)
        assert not world.table[AdapterHandle(3)].is_pinned
        stuck.set()
        await waiting
        await replaced
        assert not (await world.list())["a"]["pinned"]


@in_loop
async def test_unpin_counts_when_no_pinned_name_is_left():
    async with adapter_world() as world:
        world.sources.contents = {"a": fetched("x"), "b": fetched("x")}
        for name in ("a", "b"):
            await world.parts.adapters.load(selection(name), pin=True)
        assert (await world.parts.adapters.unpin(selection("a")))["pinned"] is False
        assert world.table[AdapterHandle(1)].is_pinned
        await world.parts.adapters.unload(selection("b"))
        assert not world.table[AdapterHandle(1)].is_pinned
        await world.parts.adapters.pin(selection("a"))
        assert world.table[AdapterHandle(1)].is_pinned


@in_loop
async def test_a_load_whose_caller_leaves_pins_nothing_that_nobody_can_name():
    async with adapter_world() as world:
        stuck = asyncio.Event()
        world.shard.on_prepare = lambda handle, content: stuck.wait()
        loading = asyncio.create_task(world.parts.adapters.load(selection("a"), pin=True))
        await until(lambda: world.table.snapshot() and world.state(AdapterHandle(1)) == "preparing")
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        assert not world.table[AdapterHandle(1)].is_pinned
        stuck.set()
        await until(lambda: world.state(AdapterHandle(1)) == "resident")


@in_loop
async def test_an_adapter_unloaded_while_it_is_loaded_and_pinned_is_gone_and_not_pinned():
    async with adapter_world() as world:
        stuck = asyncio.Event()
        world.shard.on_prepare = lambda handle, content: stuck.wait()
        loading = asyncio.create_task(world.parts.adapters.load(selection("a"), pin=True))
        await until(lambda: world.table.snapshot() and world.state(AdapterHandle(1)) == "preparing")
        unloading = asyncio.create_task(world.parts.adapters.unload(selection("a")))
        await asyncio.sleep(0)
        stuck.set()
        with pytest.raises(AdapterNotLoadedError):
            await loading
        await unloading
        assert await world.list() == {}
        assert world.table.snapshot() == []
