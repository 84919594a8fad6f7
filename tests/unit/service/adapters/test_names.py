"""Names, contents and handles: sharing, replacement, unload."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched, ref, selection
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import (
    AdapterUnavailableError,
    refused,
)
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
async def test_w10_one_id_in_two_sources_is_two_adapters():
    """LoRAX serves the first source's to all."""
    async with adapter_world() as world:
        world.shard.on_fetch = lambda query: fetched(f"{query.ref.id} of {query.ref.source}")
        answers = [await world.generate("a", adapter_source=each) for each in ("local", "hub")]
        assert world.handle("a", "local") != world.handle("a", "hub")
        assert answers[0].sequences[0].tokens.ids != answers[1].sequences[0].tokens.ids
        assert sorted(world.shard.prepared.values()) == [
            "content of a of hub", "content of a of local",
        ]  # fmt: skip


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
        unloading = asyncio.create_task(world.parts.adapters.unload(selection("a")))
        await until(lambda: world.catalog.names.find(ref("a")) is None)
        assert not unloading.done()
        assert (await world.list())["a"]["state"] == "retiring"
        assert await world.finish(stream) == 100
        answer = await unloading
        assert answer["freed"] == {"device": 1 << 20, "host": 1 << 20, "disk": 1 << 20}
        tiers = await world.shard.adapter_tiers([fetched("a").part])
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
        await world.parts.adapters.unload(selection("a"))
        future.set_result(fetched("a", version="7"))
        await looking
        listed = (await world.list())["a"]
        assert (listed["version"], listed["rank"], listed["state"]) == ("7", 8, "resident")


@in_loop
async def test_requests_that_come_during_an_unload_get_the_adapter_anew():
    async with adapter_world() as world:
        world.shard.step_delay_s = 0.001
        stream = await world.stream("a", 100)
        unloading = asyncio.create_task(world.parts.adapters.unload(selection("a")))
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
        lease = await world.parts.adapters.directory.acquire(selection("a"))
        unloading = asyncio.create_task(world.parts.adapters.unload(selection("a")))
        await until(lambda: world.catalog.names.find(ref("a")) is None)
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
        unloading = asyncio.create_task(world.parts.adapters.unload(selection("a")))
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
        answer = await world.parts.adapters.unload(selection("a"))
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
        answer = await world.parts.adapters.unload(selection("a"))
        assert answer["freed"] == {"device": 1 << 20, "host": 0, "disk": 0}
        assert set(world.shard._host) == {"content of a", "content of b"}
        listed = await world.list()
        assert listed["merged:a+b"]["state"] == "resident"


@in_loop
async def test_a_name_that_is_not_loaded_cannot_be_managed():
    async with adapter_world() as world:
        for call in (
            world.parts.adapters.unload(selection("a")),
            world.parts.adapters.pin(selection("a")),
            world.parts.adapters.unpin(selection("a")),
            world.parts.adapters.reload(selection("a")),
        ):
            with pytest.raises(AdapterNotLoadedError, match="adapter local:a is not loaded"):
                await call
        world.sources.contents["a"] = refused("it is a pickle")
        with pytest.raises(AdapterUnavailableError):
            await world.parts.adapters.load(selection("a"))
        with pytest.raises(AdapterNotLoadedError):
            await world.parts.adapters.unload(selection("a"))
        # Known and refused: its source can be asked anew.
        world.sources.contents["a"] = fetched("repaired")
        assert (await world.parts.adapters.reload(selection("a")))["state"] == "absent"


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
        assert lease.content.key == fake_fetched(shard.queries[0]).part.content_digest
        lease.release()
