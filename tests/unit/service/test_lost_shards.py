"""Streams go on when the shards are lost: nothing is missing in them, and nothing is there twice."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from tests.helpers.mortal_shards import ADAPTERS, BLOCKS, MortalShards, play

from lorax_contract.adapters import AdapterPart
from lorax_contract.errors import (
    GenerationError,
    ShardUnavailableError,
    UnhealthyError,
)
from lorax_contract.step import (
    AdapterHandle,
    FinishCode,
)
from lorax_router.core.scheduler import Scheduler


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_streams_are_whole_whenever_the_shards_die(depth: int, seed: int) -> None:
    async def scene(world: MortalShards) -> None:
        draw = random.Random(seed)
        reading = [
            asyncio.create_task(
                world.read(world.spec(draw.randint(1, 60), draw.randint(0, ADAPTERS), number))
            )
            for number in range(30)
        ]
        for _ in range(5):
            for _ in range(draw.randint(0, 60)):
                await asyncio.sleep(0)
            world.kill()
            for _ in range(draw.randint(0, 20)):
                await asyncio.sleep(0)
            world.bring_back()
        await asyncio.gather(*reading)
        assert world.loop.stats().num_free_blocks == BLOCKS
        num_lost = world.sample("lorax_shards_lost_total")
        assert 1 <= num_lost == world.sample("lorax_shards_lost_duration_count") <= 5
        assert world.loop.stats().epoch == world.shard.epoch > 1

    play(scene, depth)


def test_a_loss_is_noticed_while_nothing_runs_and_requests_that_come_meanwhile_wait() -> None:
    async def scene(world: MortalShards) -> None:
        await world.read(world.spec(3))
        world.kill()
        for _ in range(10):
            await asyncio.sleep(0)
        with pytest.raises(UnhealthyError):
            await world.loop.health()
        reading = asyncio.create_task(world.read(world.spec(20, adapter=1)))
        await asyncio.sleep(0.05)
        assert not reading.done()
        world.bring_back()
        await reading
        await world.loop.health()

    play(scene)


def test_a_step_that_hangs_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fake step takes no time that could be fitted.
    monkeypatch.setattr(Scheduler, "expected_s", property(lambda _: 0.005))

    async def scene(world: MortalShards) -> None:
        await world.read(world.spec(60))
        world.is_back.clear()
        world.shard.hold()
        reading = [asyncio.create_task(world.read(world.spec(20 + n, n))) for n in range(3)]
        while world.loop.has_shards:
            await asyncio.sleep(0.01)
        with pytest.raises(UnhealthyError, match="no answer after"):
            await world.loop.health()
        world.shard.let_go()
        world.bring_back()
        await asyncio.gather(*reading)

    play(scene)


def test_a_request_that_is_cancelled_meanwhile_is_not_computed_again() -> None:
    async def scene(world: MortalShards) -> None:
        stream = world.loop.submit(world.spec(200))
        await anext(stream)
        world.kill()
        await asyncio.sleep(0)
        await stream.aclose()
        world.bring_back()
        await world.read(world.spec(10))
        assert not any(stream.handle for stream in world.loop._streams.values())
        assert world.loop.stats().num_free_blocks == BLOCKS

    play(scene)


def test_requests_that_fit_no_more_end_in_words_and_the_others_go_on() -> None:
    async def scene(world: MortalShards) -> None:
        large, small = world.spec(200), world.spec(60)
        stream = world.loop.submit(large)
        await anext(stream)
        reading = asyncio.create_task(world.read(small))
        await asyncio.sleep(0)
        world.kill()
        world.shard._num_blocks = 20
        world.bring_back()
        *_, last = [chunk async for chunk in stream]
        assert last.finish is FinishCode.ERROR
        assert isinstance(last.error, GenerationError)
        assert "20" in str(last.error)
        await reading
        assert world.loop.stats().num_free_blocks == 20

    play(scene)


def test_where_no_shards_come_every_request_ends_in_words() -> None:
    async def scene(world: MortalShards) -> None:
        streams = [world.loop.submit(world.spec(200, number % 2)) for number in range(5)]
        await anext(streams[0])
        world.failure = ShardUnavailableError("the shards ended 3 times in a row")
        world.kill()
        world.is_back.set()
        for stream in streams:
            *_, last = [chunk async for chunk in stream]
            assert last.finish is FinishCode.ERROR
            assert last.error is not None
        with pytest.raises(ShardUnavailableError, match="3 times"):
            await world.running

    play(scene)


def test_calls_beside_the_steps_wait_for_the_next_shards() -> None:
    async def scene(world: MortalShards) -> None:
        world.kill()
        asking = asyncio.create_task(world.sessions.adapter_tiers([]))
        loading = asyncio.create_task(world.loop.load_adapter(AdapterHandle(1)))
        await asyncio.sleep(0.02)
        assert not asking.done()
        assert not loading.done()
        world.bring_back()
        await asyncio.gather(asking, loading)
        assert world.loop.is_adapter_resident(AdapterHandle(1))

    play(scene)


def test_an_adapter_that_was_to_leave_has_left_with_the_shards() -> None:
    async def scene(world: MortalShards) -> None:
        await world.loop.load_adapter(AdapterHandle(1))
        world.kill()
        retiring = asyncio.create_task(world.loop.retire_adapter(AdapterHandle(1)))
        forgetting = asyncio.create_task(
            world.sessions.release_adapter(AdapterHandle(2), [AdapterPart("content", "files")])
        )
        await asyncio.sleep(0.02)
        assert not retiring.done()
        world.bring_back()
        await asyncio.gather(retiring, forgetting)
        assert world.loop.adapter_record(AdapterHandle(1)) is None

    play(scene)


def test_whoever_loads_an_adapter_hears_that_it_has_no_room_any_more() -> None:
    async def scene(world: MortalShards) -> None:
        world.loop.add_adapter(AdapterHandle(9), 1000)
        world.kill()
        loading = asyncio.create_task(world.loop.load_adapter(AdapterHandle(9)))
        await asyncio.sleep(0.02)
        world.shard._info = replace(world.shard._info, adapter_bytes=500)
        world.bring_back()
        with pytest.raises(GenerationError, match="no room"):
            await loading

    play(scene)


def test_a_call_that_takes_too_long_is_no_loss() -> None:
    async def scene(world: MortalShards) -> None:

        async def too_slow(*_: object) -> None:
            raise ShardUnavailableError("no answer within 60 s (DEADLINE_EXCEEDED)")

        world.shard.adapter_tiers = too_slow  # type: ignore[method-assign,assignment]
        reading = asyncio.create_task(world.read(world.spec(60)))
        with pytest.raises(ShardUnavailableError, match="within 60 s"):
            await world.sessions.adapter_tiers([])
        await reading
        assert world.loop.has_shards
        assert world.shard.epoch == 1

    play(scene)


def test_a_loss_that_shows_beside_steps_is_noticed_at_once() -> None:
    async def scene(world: MortalShards) -> None:
        reading = asyncio.create_task(world.read(world.spec(60)))
        await asyncio.sleep(0)
        world.loop._losses.notice(ShardUnavailableError("seen elsewhere"))
        world.kill()
        world.bring_back()
        await reading
        assert world.shard.epoch == 2

    play(scene)


def test_shards_that_are_lost_during_the_end_are_not_waited_for() -> None:
    async def scene(world: MortalShards) -> None:
        stream = world.loop.submit(world.spec(200))
        await anext(stream)
        world.loop.expect_no_shards()
        world.kill()
        *_, last = [chunk async for chunk in stream]
        assert last.finish is FinishCode.ERROR
        with pytest.raises(ShardUnavailableError):
            await world.running
        with pytest.raises(ShardUnavailableError):
            await world.sessions.adapter_tiers([])

    play(scene)


def test_an_end_while_no_shards_are_there_ends_requests_in_words() -> None:
    async def scene(world: MortalShards) -> None:
        stream = world.loop.submit(world.spec(200))
        await anext(stream)
        world.kill()
        while world.loop.has_shards:
            await asyncio.sleep(0)
        world.running.cancel()
        *_, last = [chunk async for chunk in stream]
        assert last.error is not None
        assert "the shards failed" in last.error.public
        await asyncio.gather(world.running, return_exceptions=True)

    play(scene)


def test_it_is_counted_for_whom_the_shards_were_lost_and_how_often_each_came_back() -> None:
    async def scene(world: MortalShards) -> None:
        streams = [world.loop.submit(world.spec(40, seed=number)) for number in range(3)]
        for stream in streams:
            await anext(stream)
        world.kill()
        while world.loop.has_shards:
            await asyncio.sleep(0)
        late = world.loop.submit(world.spec(5))
        await asyncio.sleep(0.05)
        world.bring_back()
        for stream in (*streams, late):
            async for _ in stream:
                pass
        costs = [each.cost for each in (*streams, late)]
        for cost in costs:
            ((lost_at, back_at),) = cost.recoveries
            assert cost.recovery_s == back_at - lost_at >= 0.05
            assert cost.num_returns == 0
        assert all(each.scheduled_at < each.recoveries[0][0] for each in costs[:3])
        assert costs[3].scheduled_at > costs[3].recoveries[0][1]

    play(scene)


def test_each_time_that_a_request_gave_way_is_counted() -> None:
    async def scene(world: MortalShards) -> None:
        streams = [world.loop.submit(world.spec(60, seed=number)) for number in range(8)]
        for stream in streams:
            async for _ in stream:
                pass
        num_returns = [each.cost.num_returns for each in streams]
        assert sum(num_returns) == world.loop.stats().num_preemptions > 0
        assert not any(each.cost.recoveries for each in streams)

    play(scene)
