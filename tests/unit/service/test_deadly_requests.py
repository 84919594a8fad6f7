"""A request that ends the shards ends itself, and a deadline counts while there are none."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.helpers.mortal_shards import BLOCKS, MortalShards, play

from lorax_contract.errors import DeadlineError, GenerationError
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
        specs = [world.spec(30, number % 2) for number in range(3)]
        make_deadly(world, *specs)
        for spec in specs:
            reading = asyncio.create_task(world.read(world.spec(60)))
            *_, last = [chunk async for chunk in world.loop.submit(spec)]
            assert last.finish is FinishCode.ERROR
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
