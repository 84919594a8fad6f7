"""A request that ends the shards ends itself, and a deadline counts while there are none."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.helpers.constraints import regex
from tests.helpers.mortal_shards import BLOCKS, MortalShards, play

from lorax_contract.errors import (
    DeadlineError,
    GenerationError,
    RowFailedError,
    ShardUnavailableError,
)
from lorax_contract.step import FinishCode, RequestSpec, StepOutcome, StepPlan
from lorax_router.core.request import RequestTerms


def make_deadly(world: MortalShards, *specs: RequestSpec) -> None:
    """Let the shards end with each step that computes one of these, and come back soon."""
    run_step = world.shard.step
    deadly = {spec.request_id for spec in specs}

    async def step(plan: StepPlan, epoch: int | None = None) -> StepOutcome:
        if world.is_back.is_set() and not deadly.isdisjoint(plan.row_ids):
            world.kill()
            asyncio.get_running_loop().call_later(0.005, world.bring_back)
        return await run_step(plan, epoch)

    world.shard.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_that_ends_the_shards_ends_and_all_others_go_on(depth: int) -> None:
    async def scene(world: MortalShards) -> None:
        deadly = world.spec(30, adapter=1)
        make_deadly(world, deadly)
        stream = world.loop.submit(deadly)
        others = [world.read(world.spec(5 + number, number % 3, number)) for number in range(20)]
        await asyncio.gather(*others)
        *_, last = [chunk async for chunk in stream]
        assert last.finish is FinishCode.ERROR
        assert isinstance(last.error, GenerationError)
        assert "lost 4 times while they computed this request" in str(last.error)
        assert world.shard.epoch == 5
        assert world.loop.stats().num_free_blocks == BLOCKS

    play(scene, depth)


def test_several_that_come_one_after_the_other_each_end() -> None:
    async def scene(world: MortalShards) -> None:
        specs = [world.spec(30 + number, number % 2) for number in range(3)]
        make_deadly(world, *specs)
        for spec in specs:
            reading = asyncio.create_task(world.read(world.spec(60)))
            *_, last = [chunk async for chunk in world.loop.submit(spec)]
            assert last.finish is FinishCode.ERROR
            await reading

    play(scene)


def test_copies_of_one_that_ends_the_shards_end_with_it_and_are_not_computed_again() -> None:
    async def scene(world: MortalShards) -> None:
        specs = [world.spec(30, adapter=1) for _ in range(6)]
        make_deadly(world, *specs)
        streams = [world.loop.submit(spec) for spec in specs]
        reading = asyncio.create_task(world.read(world.spec(40)))
        for stream in streams:
            *_, last = [chunk async for chunk in stream]
            assert isinstance(last.error, RowFailedError)
        await reading
        assert world.shard.epoch == 5
        with pytest.raises(RowFailedError, match="not tried again"):
            world.loop.submit(world.spec(30, adapter=1))
        # The same words with another adapter are another matter.
        await world.read(world.spec(30, adapter=2))

    play(scene)


def test_a_call_that_ends_the_shards_each_time_is_given_up() -> None:
    async def scene(world: MortalShards) -> None:
        calls = 0

        async def deadly(*_: object) -> None:
            nonlocal calls
            calls += 1
            world.kill()
            asyncio.get_running_loop().call_later(0.005, world.bring_back)
            raise ShardUnavailableError("the connection broke")

        world.shard.prepare_constraint = deadly  # type: ignore[method-assign,assignment]
        # It is alone at each loss, and not to blame.
        reading = asyncio.create_task(world.read(world.spec(60)))
        with pytest.raises(GenerationError, match="lost 3 times during one call"):
            await world.sessions.prepare_constraint(regex("a"))
        assert calls == 3
        await reading

    play(scene)


def test_a_deadline_ends_a_request_while_there_are_no_shards() -> None:
    async def scene(world: MortalShards) -> None:
        spec = world.spec(200)
        stream = world.loop.submit(spec, RequestTerms(deadline=time.perf_counter() + 0.3))
        world.kill()
        *_, last = [chunk async for chunk in stream]
        assert isinstance(last.error, DeadlineError)
        assert not world.loop.has_shards
        world.bring_back()
        await world.read(world.spec(3))

    play(scene)
