"""Names, contents and handles: sharing, replacement, unload, reload, pins."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched, ref, selection
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterUnavailableError, Reason, refused
from lorax_contract.errors import AdapterNotLoadedError, ValidationError
from lorax_contract.step import AdapterHandle
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.requests import MergedAdapters
from lorax_router.shards.fake.shard import FakeShard, fake_fetched


def used(world: AdapterWorld) -> list[AdapterHandle]:
    """The handle of each request that entered a step, in order."""
    return [row.spec.adapter for plan in world.shard.steps for row in plan.new_rows]


@in_loop
async def test_two_names_with_equal_content_share_a_handle_and_its_memory():
    async with adapter_world() as world:
        world.sources.contents = {"a": fetched("x"), "b": fetched("x")}
        await world.generate("a")
        await world.generate("b")
        assert used(world) == [1, 1]
        assert list(world.shard.prepared) == [1]
        listed = await world.list()
        assert listed["a"]["content_digest"] == listed["b"]["content_digest"] == "content of x"
        assert listed["a"]["state"] == listed["b"]["state"] == "resident"


@in_loop
async def test_a_name_replaced_in_use_keeps_the_old_for_those_who_run_and_then_frees_it():
    async with adapter_world() as world:
        world.sources.contents["a"] = fetched("old", valid_s=0)
        world.shard.step_delay_s = 0.001
        stream = await world.stream("a", 100)
        old = world.handle("a")
        world.sources.contents["a"] = fetched("new", valid_s=0, version="2")
        await world.generate("a")
        new = world.handle("a")
        assert used(world) == [old, new]
        assert world.state(old) == "resident"
        listed = (await world.client.get("/v1/adapters")).json()["adapters"]
        assert [(each["adapter_id"], each["state"]) for each in listed] == [
            ("a", "resident"),
            ("a", "retiring"),
        ]
        assert await world.finish(stream) == 100
        await world.gone(old)
        assert world.shard.prepared == {new: "content of new"}
        assert (await world.list())["a"]["version"] == "2"


@in_loop
async def test_a_replaced_name_that_nobody_uses_is_freed_at_once():
    async with adapter_world() as world:
        world.sources.contents["a"] = fetched("old", valid_s=0)
        await world.generate("a")
        world.sources.contents["a"] = fetched("new", valid_s=0)
        await world.generate("a")
        await world.gone(AdapterHandle(1))
        # And back: the old content gets a new handle.
        world.sources.contents["a"] = fetched("old", valid_s=0)
        await world.generate("a")
        assert used(world) == [1, 2, 3]


@in_loop
async def test_a_handle_given_up_and_wanted_again_before_it_left_is_not_mixed_up():
    async with adapter_world() as world:
        world.sources.contents["a"] = fetched("x", valid_s=0)
        await world.generate("a")
        world.sources.contents["a"] = fetched("y", valid_s=0)
        world.sources.contents["b"] = fetched("x", valid_s=0)
        answers = [world.task(name) for name in ("a", "b", "a", "b")]
        for answer in answers:
            await answer
        await world.gone(AdapterHandle(1))
        assert world.handle("a") != world.handle("b")
        assert len(set(world.shard.prepared.values())) == len(world.shard.prepared) == 2


@in_loop
async def test_unload_waits_for_its_requests_then_frees_every_tier():
    async with adapter_world() as world:
        world.shard.step_delay_s = 0.001
        stream = await world.stream("a", 100)
        unloading = asyncio.create_task(world.parts.adapters.unload(ref("a")))
        await until(lambda: world.catalog.find(ref("a")) is None)
        assert not unloading.done()
        assert (await world.list())["a"]["state"] == "retiring"
        assert await world.finish(stream) == 100
        answer = await unloading
        assert answer["freed"] == {"device": 1 << 20, "host": 1 << 20, "disk": 1 << 20}
        tiers = await world.shard.adapter_tiers()
        assert (tiers.device, tiers.host, tiers.disk) == ({}, {}, {})
        assert await world.list() == {}


@in_loop
async def test_a_name_unloaded_while_it_is_looked_up_is_known_in_full_afterwards():
    async with adapter_world() as world:
        world.sources.contents["a"] = fetched("a", valid_s=0)
        await world.generate("a")
        world.sources.contents["a"] = future = asyncio.get_running_loop().create_future()
        looking = world.task("a")
        await until(lambda: len(world.shard.queries) == 2)
        await world.parts.adapters.unload(ref("a"))
        future.set_result(fetched("a", version="7"))
        await looking
        listed = (await world.list())["a"]
        assert (listed["version"], listed["rank"], listed["state"]) == ("7", 8, "resident")


@in_loop
async def test_requests_that_come_during_an_unload_get_the_adapter_anew():
    async with adapter_world() as world:
        world.shard.step_delay_s = 0.001
        stream = await world.stream("a", 100)
        unloading = asyncio.create_task(world.parts.adapters.unload(ref("a")))
        await asyncio.sleep(0)
        await world.generate("a")
        assert used(world) == [1, 2]
        assert len(world.shard.queries) == 2
        assert not unloading.done()
        await world.finish(stream)
        answer = await unloading
        # The new one has the same content: its host copy and files are not taken from it.
        assert answer["freed"] == {"device": 1 << 20, "host": 0, "disk": 0}
        await world.generate("a")
        assert used(world) == [1, 2, 2]


@in_loop
async def test_an_unload_waits_for_requests_that_are_found_and_not_submitted_yet():
    async with adapter_world() as world:
        lease = await world.parts.service._adapters.acquire(selection("a"))
        unloading = asyncio.create_task(world.parts.adapters.unload(ref("a")))
        await until(lambda: world.catalog.find(ref("a")) is None)
        assert world.state(lease.handle) == "absent"
        assert not unloading.done()
        lease.release()
        lease.release()
        await unloading
        assert world.state(lease.handle) == "gone"


@in_loop
async def test_an_unload_goes_on_when_its_caller_leaves():
    async with adapter_world() as world:
        world.shard.step_delay_s = 0.001
        stream = await world.stream("a", 50)
        unloading = asyncio.create_task(world.parts.adapters.unload(ref("a")))
        await asyncio.sleep(0)
        unloading.cancel()
        await asyncio.gather(unloading, return_exceptions=True)
        assert await world.finish(stream) == 50
        await until(lambda: not world.shard.prepared and not world.shard._host)


@in_loop
async def test_what_is_shared_stays_when_one_of_two_names_is_unloaded():
    async with adapter_world() as world:
        world.sources.contents = {"a": fetched("x"), "b": fetched("x")}
        await world.generate("a")
        await world.generate("b")
        answer = await world.parts.adapters.unload(ref("a"))
        assert answer["shared_with"] == ["local:b"]
        assert sum(answer["freed"].values()) == 0
        await world.generate("b")
        assert used(world) == [1, 1, 1]
        assert len(world.shard.queries) == 2


@in_loop
async def test_unload_leaves_parts_that_a_merge_is_made_of():
    async with adapter_world() as world:
        await world.generate(None, merged_adapters=MergedAdapters(ids=["a", "b"], weights=[1, 1]))
        await world.generate("a")
        assert len(world.shard.prepared) == 2
        answer = await world.parts.adapters.unload(ref("a"))
        assert answer["freed"] == {"device": 1 << 20, "host": 0, "disk": 0}
        assert set(world.shard._host) == {"content of a", "content of b"}
        listed = await world.list()
        assert listed["merged:a+b"]["state"] == "resident"


@in_loop
async def test_a_name_that_is_not_loaded_cannot_be_managed():
    async with adapter_world() as world:
        for call in (
            world.parts.adapters.unload(ref("a")),
            world.parts.adapters.pin(ref("a")),
            world.parts.adapters.unpin(ref("a")),
            world.parts.adapters.reload(selection("a")),
        ):
            with pytest.raises(AdapterNotLoadedError, match="adapter local:a is not loaded"):
                await call
        world.sources.contents["a"] = refused("it is a pickle")
        with pytest.raises(AdapterUnavailableError):
            await world.parts.adapters.load(selection("a"))
        with pytest.raises(AdapterNotLoadedError):
            await world.parts.adapters.unload(ref("a"))
        # Known and refused: its source can be asked anew.
        world.sources.contents["a"] = fetched("repaired")
        assert (await world.parts.adapters.reload(selection("a")))["state"] == "absent"


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
        assert (await world.parts.adapters.unpin(ref("a")))["pinned"] is False
        assert world.table[AdapterHandle(1)].is_pinned
        await world.parts.adapters.unload(ref("b"))
        assert not world.table[AdapterHandle(1)].is_pinned
        await world.parts.adapters.pin(ref("a"))
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
        unloading = asyncio.create_task(world.parts.adapters.unload(ref("a")))
        await asyncio.sleep(0)
        stuck.set()
        with pytest.raises(AdapterNotLoadedError):
            await loading
        await unloading
        assert await world.list() == {}
        assert world.table.snapshot() == []


@in_loop
async def test_a_load_that_comes_while_the_adapter_is_being_freed_brings_it_back():
    async with adapter_world(max_active_adapters=1) as world:
        await world.parts.adapters.load(selection("a"))
        freeing = asyncio.Event()
        release = world.shard.release_adapter

        async def slow(handle: AdapterHandle, forget: object = (), epoch: object = None) -> None:
            await freeing.wait()
            await release(handle)

        world.shard.release_adapter = slow
        other = world.task("b")
        await until(lambda: world.state(AdapterHandle(1)) == "releasing")
        loading = asyncio.create_task(world.parts.adapters.load(selection("a")))
        await until(lambda: world.table[AdapterHandle(1)].is_called)
        freeing.set()
        await other
        assert (await loading)["state"] == "resident"


@in_loop
async def test_what_left_the_disk_is_fetched_again_for_the_request():
    async with adapter_world() as world:
        await world.generate("a")
        await world.parts.adapters.unload(ref("a"))
        gone = [AdapterUnavailableError(Reason.EVICTED, "its files are gone")]

        def prepare(handle: AdapterHandle, content: object) -> None:
            if gone:
                raise gone.pop()

        world.shard.on_prepare = prepare
        assert len((await world.generate("a")).sequences[0].tokens.ids) == 3
        assert [query.refresh for query in world.shard.queries] == [False, False, True]


@in_loop
async def test_a_content_that_left_the_disk_and_its_source_fails_in_words_and_then_is_the_new():
    async with adapter_world() as world:
        evicted = AdapterUnavailableError(Reason.EVICTED, "its files are gone")

        def prepare(handle: AdapterHandle, content: object) -> None:
            if handle == 1:
                world.sources.contents["a"] = fetched("new")
                raise evicted

        world.shard.on_prepare = prepare
        with pytest.raises(AdapterUnavailableError, match="replaced at its source") as raised:
            await world.generate("a")
        assert raised.value.kind.http_status == 424
        await world.generate("a")
        assert used(world) == [2]
        await world.gone(AdapterHandle(1))


@in_loop
async def test_a_content_that_is_evicted_again_and_again_is_given_up():
    async with adapter_world() as world:

        def prepare(handle: AdapterHandle, content: object) -> None:
            raise AdapterUnavailableError(Reason.EVICTED, "its files are gone")

        world.shard.on_prepare = prepare
        with pytest.raises(AdapterUnavailableError, match="its files are gone"):
            await world.generate("a")
        assert len(world.shard.queries) == 3


@in_loop
async def test_w28_names_that_are_never_seen_again_do_not_fill_the_memory():
    async with adapter_world() as world:
        catalog = world.catalog
        catalog._max_names, catalog._max_idle = 64, 16
        for number in range(300):
            world.sources.contents[f"n{number}"] = fetched("x")
            await world.generate(f"n{number}", 1)
        assert len(catalog._names) <= 64
        (entry,) = catalog.entries()
        assert len(entry.names) <= 64
        catalog_size = []
        for number in range(300):
            world.sources.contents[f"m{number}"] = refused("no")
            with pytest.raises(AdapterUnavailableError):
                await world.generate(f"m{number}", 1)
            catalog_size.append(len(catalog._names))
        assert max(catalog_size) <= 64


@in_loop
async def test_w28_adapters_that_are_never_used_again_do_not_fill_the_memory():
    async with adapter_world(max_active_adapters=4) as world:
        catalog = world.catalog
        catalog._max_idle = 16
        await world.parts.adapters.load(selection("kept"), pin=True)
        for number in range(100):
            await world.generate(f"n{number}", 1)
        await until(lambda: len(world.table.snapshot()) <= 16 + 4)
        assert len(catalog._entries) <= 16
        assert len(catalog.by_handle) <= 16 + 4
        assert world.handle("kept") == 1
        assert world.table[AdapterHandle(1)].is_pinned
        # What was used last is still known.
        world.handle("n99")


@in_loop
async def test_an_adapter_that_never_fits_is_refused_in_words_and_leaves_nothing():
    async with adapter_world() as world:
        world.sources.contents["a"] = fetched("a", device_bytes=1 << 40)
        with pytest.raises(ValidationError, match="--adapter-memory-fraction"):
            await world.generate("a")
        with pytest.raises(ValidationError, match="--adapter-memory-fraction"):
            await world.parts.adapters.load(selection("a"))
        assert world.catalog.by_handle == {}
        assert world.table.snapshot() == []


@in_loop
async def test_names_and_handles_need_an_engine_and_an_answer_only():
    """A directory can be used without the rest of the router."""
    shard = FakeShard()
    directory = AdapterDirectory(shard)
    async with adapter_world() as world:
        directory.attach(world.parts.engine)
        lease = await directory.acquire(selection("a"))
        assert lease.content_key == fake_fetched(shard.queries[0]).part.content_digest
        lease.release()
