"""Requests that wait for adapters: nobody waits for another's, and failures stay where they belong."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched, ref, selection
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterUnavailableError, Reason, refused
from lorax_contract.errors import GenerationError, OverloadedError, ShardError, ValidationError
from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
)
from lorax_router.service.engine import orders
from lorax_router.service.requests import MergedAdapters


def hanging(world: AdapterWorld, name: str) -> asyncio.Future[object]:
    """Make the fetch of a name take until the future is set."""
    future = asyncio.get_running_loop().create_future()
    world.sources.contents[name] = future
    return future


def expected(world: AdapterWorld, handle: int, num: int) -> list[int]:
    """The tokens that an adapter gives alone for the prompt of AdapterWorld."""
    spec = RequestSpec(
        request_id=RequestId(0),
        prompt_ids=[900, 1, 2],
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=num, ignore_eos=True),
        adapter=AdapterHandle(handle),
    )
    return world.shard.model.expected_tokens(spec)


@in_loop
async def test_a_fetch_that_hangs_delays_nobody_else():
    async with adapter_world() as world:
        future = hanging(world, "cold")
        stuck = world.task("cold")
        await until(lambda: world.catalog.names.find(ref("cold")) is not None)
        stream = await world.stream("warm", 50)
        assert await world.finish(stream) == 50
        await world.generate(None)
        assert (await world.metrics())["lorax_requests_resolving"] == 1.0
        assert (await world.list())["cold"]["state"] == "resolving"
        assert not stuck.done()
        future.set_result(fetched("cold"))
        await stuck
        assert (await world.metrics())["lorax_requests_resolving"] == 0.0


@in_loop
async def test_a_preparation_that_hangs_delays_nobody_else():
    async with adapter_world() as world:
        freed = asyncio.Event()
        world.shard.on_prepare = lambda handle, content: freed.wait() if handle == 1 else None
        stuck = world.task("cold")
        await until(lambda: world.table.snapshot() and world.state(AdapterHandle(1)) == "preparing")
        stream = await world.stream("warm", 50)
        assert await world.finish(stream) == 50
        assert not stuck.done()
        freed.set()
        assert (await stuck).sequences[0].tokens.ids == expected(world, 1, 3)


async def refusals(tasks: list[asyncio.Task[object]]) -> list[str]:
    """What those were told that were refused; the others wait on."""
    for _ in range(5):
        await asyncio.sleep(0)
    return [task.exception().public for task in tasks if task.done()]


async def ended(tasks: list[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@in_loop
async def test_a_crowd_for_an_adapter_that_never_comes_is_refused_alone():
    async with adapter_world(max_concurrent_requests=100) as world:
        await world.generate("warm")
        hanging(world, "cold")
        crowd = [world.task("cold") for _ in range(110)]
        told = await refusals(crowd)
        assert len(told) == 60
        words = "50 requests wait for the adapter local:cold already, as many as may; try again"
        assert all(words in each for each in told)
        # Nobody else pays for it, also when a whole house of them comes.
        everybody = [world.task(None) for _ in range(50)] + [world.task("warm") for _ in range(50)]
        everybody += [world.task("other") for _ in range(50)]
        assert len(await asyncio.gather(*everybody)) == 150
        await ended(crowd)
        await world.generate("warm")


@in_loop
async def test_a_source_that_never_answers_refuses_its_own_requests_only():
    async with adapter_world(max_concurrent_requests=100) as world:
        await world.generate("warm")
        for number in range(110):
            hanging(world, f"cold{number}")
        crowd = [world.task(f"cold{number}") for number in range(110)]
        told = await refusals(crowd)
        assert len(told) == 10
        assert "100 requests wait for adapters of the source local already" in told[0]
        await asyncio.gather(
            *(world.task(None) for _ in range(50)),
            *(world.task("warm") for _ in range(50)),
            *(world.task("x", adapter_source="s3") for _ in range(50)),
        )
        await ended(crowd)
        await world.generate("other")


@in_loop
async def test_a_preparation_that_hangs_takes_no_permit_from_anybody_else():
    async with adapter_world(max_concurrent_requests=100) as world:
        await world.generate("warm")
        freed = asyncio.Event()
        world.shard.on_prepare = lambda handle, content: freed.wait()
        crowd = [world.task(f"cold{number}") for number in range(100)]
        await until(lambda: sum(record.num_waiting for record in world.table.snapshot()) == 100)
        everybody = [world.task(None) for _ in range(50)] + [world.task("warm") for _ in range(50)]
        await asyncio.gather(*everybody)
        freed.set()
        await asyncio.gather(*crowd)


@in_loop
async def test_with_few_permits_all_of_them_may_wait_for_one_adapter():
    async with adapter_world(max_concurrent_requests=4) as world:
        future = hanging(world, "cold")
        crowd = [world.task("cold") for _ in range(5)]
        assert len(await refusals(crowd)) == 1
        future.set_result(fetched("cold"))
        answers = await asyncio.gather(*crowd, return_exceptions=True)
        assert sum(isinstance(answer, OverloadedError) for answer in answers) == 1


@in_loop
async def test_a_merge_waits_for_each_of_its_adapters():
    async with adapter_world(max_concurrent_requests=4) as world:
        hanging(world, "b")
        merged = MergedAdapters(ids=["a", "b"], weights=[1.0, 1.0])
        crowd = [world.task(None, merged_adapters=merged) for _ in range(4)]
        assert await refusals(crowd) == []
        for name in ("a", "b"):
            with pytest.raises(OverloadedError):
                await world.generate(name)
        await ended(crowd)
        await world.generate("a")


@in_loop
async def test_a_client_that_leaves_ends_its_fetch_and_leaves_nothing():
    async with adapter_world() as world:
        future = hanging(world, "cold")
        stuck = world.task("cold")
        await until(lambda: world.catalog.names.find(ref("cold")) is not None)
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        assert future.cancelled()
        assert await world.list() == {}
        assert world.parts.service._permits.idle.is_set()


@in_loop
async def test_a_client_that_leaves_while_its_adapter_is_prepared_leaves_nothing():
    async with adapter_world() as world:
        freed = asyncio.Event()
        world.shard.on_prepare = lambda handle, content: freed.wait()
        stuck = world.task("cold")
        await until(lambda: world.table.snapshot() and world.state(AdapterHandle(1)) == "preparing")
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        freed.set()
        await until(lambda: world.state(AdapterHandle(1)) == "resident")
        assert world.table[AdapterHandle(1)].is_idle


@in_loop
async def test_one_part_of_a_merge_that_fails_ends_the_fetch_of_the_others():
    async with adapter_world() as world:
        future = hanging(world, "a")
        world.sources.contents["b"] = refused("it is a pickle")
        merged = MergedAdapters(ids=["a", "b"], weights=[1.0, 1.0])
        with pytest.raises(AdapterUnavailableError, match="pickle"):
            await world.generate(None, merged_adapters=merged)
        assert future.cancelled()


@in_loop
async def test_with_more_adapters_than_slots_and_all_busy_everybody_gets_a_turn():
    async with adapter_world(max_active_adapters=2) as world:
        world.shard.step_delay_s = 0.001
        # Longer than several turns together, so that nobody waits for another's end.
        answers = await asyncio.gather(*(world.generate(f"a{i}", 150) for i in range(5)))
        for number, answer in enumerate(answers):
            handle = world.handle(f"a{number}")
            assert answer.sequences[0].tokens.ids == expected(world, handle, 150)
        assert world.parts.engine.stats().num_preemptions > 0
        assert len(world.shard.prepared) == 2


@in_loop
async def test_the_base_model_and_warm_adapters_go_on_while_others_wait_for_slots():
    async with adapter_world(max_active_adapters=1, adapter_cycle_time_s=60.0) as world:
        busy = await world.stream("a", 150)
        world.shard.hold()  # or `a` may end while nobody looks
        waiting = world.task("b")
        base = world.task(None, 50)
        await until(lambda: len(world.table.snapshot()) == 2)
        # From here on only the loop moves both: `a` is far from its end when the base ends.
        await until(lambda: world.parts.engine.stats().num_waiting == 2)
        world.shard.let_go()
        assert len((await base).sequences[0].tokens.ids) == 50
        world.shard.hold()
        samples = await world.metrics()
        (info,) = [name for name in samples if name.startswith("vllm:lora_requests_info")]
        assert 'running_lora_adapters="a",waiting_lora_adapters="b"' in info
        assert not waiting.done()
        world.shard.let_go()
        await world.finish(busy)
        await waiting


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (refused("`target_parameters` is not served"), 422, "target_parameters"),
        (AdapterUnavailableError(Reason.CORRUPT, "its header is cut off"), 422, "cut off"),
        (AdapterUnavailableError(Reason.TRANSIENT, "the disk is slow"), 424, "disk is slow"),
        (ShardError("rank 1 at unix:/secret: out of memory"), 424, "could not be loaded"),
        (RuntimeError("index 7 is out of bounds"), 424, "could not be loaded"),
    ],
)
def test_a_failed_preparation_ends_its_own_requests_in_words(error, status, words):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            failing = asyncio.Event()

            async def prepare(handle: AdapterHandle, content: object) -> None:
                if handle == 1:
                    await failing.wait()
                    raise error

            world.shard.on_prepare = prepare
            broken = [world.task("broken") for _ in range(3)]
            await until(
                lambda: world.table.snapshot() and world.table[AdapterHandle(1)].num_waiting == 3
            )
            stream = await world.stream("good", 50)
            failing.set()
            for task in broken:
                with pytest.raises((AdapterUnavailableError, GenerationError)) as raised:
                    await task
                assert raised.value.kind.http_status == status
                assert words in raised.value.public
                assert "secret" not in raised.value.public
            assert await world.finish(stream) == 50
            assert world.table.capacity().num_held == 1
            # And it is tried again for whoever comes next.
            world.shard.on_prepare = None
            await world.generate("broken")

    scene()


@in_loop
async def test_w14_a_release_that_fails_is_tried_again_and_harms_nobody(monkeypatch):
    monkeypatch.setattr(orders, "_RELEASE_PAUSES_S", (0.0,))
    async with adapter_world(max_active_adapters=1) as world:
        failures: list[Exception] = [ShardError("busy"), RuntimeError("odd")]

        def release(handle: AdapterHandle, forget: object) -> None:
            if failures:
                raise failures.pop()

        world.shard.on_release = release
        await world.generate("a")
        answers = await asyncio.gather(world.generate("b"), world.generate(None))
        assert failures == []
        assert list(world.shard.prepared) == [2]
        assert len(answers) == 2


@in_loop
async def test_memory_that_is_not_known_to_be_free_is_promised_to_nobody(monkeypatch):
    """However often a release fails: those who wait for its slot wait on, the others do not."""
    monkeypatch.setattr(orders, "_RELEASE_PAUSES_S", (0.0,))
    async with adapter_world(max_active_adapters=1) as world:
        tries = 0
        is_busy = True

        def release(handle: AdapterHandle, forget: object) -> None:
            nonlocal tries
            tries += 1
            if is_busy:
                raise ShardError("busy")

        world.shard.on_release = release
        await world.generate("a")
        waiting = asyncio.create_task(world.generate("b"))
        await until(lambda: tries > 20)
        await world.generate(None)
        assert world.table.capacity().num_held == 1
        assert list(world.shard.prepared) == [1]
        assert not waiting.done()
        is_busy = False
        await waiting
        assert list(world.shard.prepared) == [2]


@in_loop
async def test_what_could_not_be_prepared_is_released_before_its_memory_is_promised(monkeypatch):
    """On some rank it may lie all the same."""
    monkeypatch.setattr(orders, "_RELEASE_PAUSES_S", (0.0,))
    async with adapter_world(max_active_adapters=1) as world:
        released: list[int] = []
        is_busy = True

        def prepare(handle: AdapterHandle, content: object) -> None:
            if handle == 1:
                raise ShardError("odd")

        def release(handle: AdapterHandle, forget: object) -> None:
            released.append(handle)
            if is_busy:
                raise ShardError("busy")

        world.shard.on_prepare, world.shard.on_release = prepare, release
        with pytest.raises(GenerationError):
            await world.generate("a")
        waiting = asyncio.create_task(world.generate("b"))
        await until(lambda: len(released) > 5)
        assert set(released) == {1}
        assert not waiting.done()
        is_busy = False
        await waiting


@in_loop
async def test_a_request_that_pins_leave_no_room_for_is_refused_in_words():
    async with adapter_world() as world:
        room = 1 << 30
        world.sources.contents["big"] = fetched("big", device_bytes=room)
        world.sources.contents["kept"] = fetched("kept", device_bytes=room // 2)
        await world.parts.adapters.load(selection("kept"), pin=True)
        with pytest.raises(ValidationError, match="pinned adapters leave"):
            await world.generate("big")
        with pytest.raises(ValidationError, match="pinned adapters leave"):
            await world.parts.adapters.load(selection("big"))
        await world.parts.adapters.unpin(selection("kept"))
        await world.generate("big")


@in_loop
async def test_phases_of_a_cold_start_are_told_once():
    async with adapter_world() as world:
        timings = {"queue": 0.5, "resolve": 1.0, "download": 2.0, "verify": 0.25}
        world.sources.contents["a"] = fetched("a", timings=timings)
        first, second = await world.generate("a"), await world.generate("a")
        assert first.adapter.phases["resolve"] == 1.5
        assert set(first.adapter.phases) >= {"resolve", "download", "verify", "wait", "parse"}
        assert second.adapter.phases == {}
        metrics = await world.metrics()
        assert metrics['lorax_adapter_cold_start_duration_count{phase="download"}'] == 1.0


@in_loop
async def test_requests_fail_when_the_shards_do_and_nothing_waits_for_ever():
    async with adapter_world() as world:
        world.shard.on_prepare = lambda handle, content: asyncio.Event().wait()
        stuck = world.task("cold")
        loading = asyncio.create_task(world.parts.adapters.load(selection("other")))
        await until(lambda: len(world.table.snapshot()) == 2)
        running = await world.parts.service.generate_stream(world.request(None, 50))
        await anext(running)
        world.shard.die()
        for task in (stuck, loading):
            with pytest.raises(Exception, match="shards|shard"):
                await task
        with pytest.raises(GenerationError):
            await world.finish(running)
        with pytest.raises(Exception, match="shard|dead"):
            await asyncio.wait_for(world.parts.adapters.unload(selection("cold")), 10)
