"""Blocks that requests share: only what was computed, and counted once."""

from __future__ import annotations

import pytest
from tests.helpers.swap_world import SwapWorld

from lorax_contract.step import RequestId

PROMPT = list(range(1, 33))
# What a request that finds nothing computes: its prompt, and three of its four tokens.
ALONE = len(PROMPT) + 3


def world_of(num_blocks: int = 64, **options: int) -> SwapWorld:
    """Return a world whose shard checks each block that a row reads."""
    return SwapWorld(num_blocks, num_host_blocks=0, **options)  # type: ignore[arg-type]


def plan_ahead(world: SwapWorld) -> None:
    """Plan as far ahead as the scheduler may, and compute nothing."""
    while (plan := world.scheduler.plan(0.0)) is not None:
        world.plans.append(plan)


@pytest.mark.parametrize("depth", [1, 2])
def test_w20_who_leaves_before_its_prompt_was_computed_leaves_no_blocks_behind(depth: int) -> None:
    """LoRAX keeps blocks by the prompt that they were meant for, whatever is in them."""
    world = world_of(depth=depth)
    waiting = world.submit(PROMPT, 4)
    world.cancel(waiting)
    second = world.submit(PROMPT, 4)
    world.finish()
    assert (world.computed[waiting], world.computed[second]) == (0, ALONE)


@pytest.mark.parametrize("depth", [1, 2])
def test_w20_a_pass_that_failed_leaves_no_blocks_behind(depth: int) -> None:
    """Who comes next with the same prompt computes all of it."""
    world = world_of(depth=depth)
    culprit = world.submit(PROMPT, 4)
    world.harmful.add(culprit)
    while culprit in world.specs:
        world.step()
    assert world.received[culprit] == []
    second = world.submit(PROMPT, 4)
    world.finish()
    assert world.computed[second] == ALONE


@pytest.mark.parametrize("num_steps", range(4))
def test_w20_who_leaves_in_the_midst_leaves_what_was_computed_and_no_more(num_steps: int) -> None:
    """Its prompt takes three steps of at most 64 tokens; the next finds those that were booked."""
    world = world_of(depth=1)
    prompt = list(range(160))
    first = world.submit(prompt, 4)
    for _ in range(num_steps):
        world.step()
    plan_ahead(world)
    world.cancel(first)
    second = world.submit(prompt, 4)
    world.finish()
    # Something is left to compute, a block at least; and nothing counts of the step that was on
    # its way when the first left.
    found = min(64 * num_steps, 156)
    assert world.computed[second] == 160 + 3 - found


def test_w22_a_block_that_many_share_is_counted_once() -> None:
    """Sixteen prompts of eight blocks each, of which seven are the same: 48 blocks hold them all."""
    world = world_of(48, max_rows=16)
    first = world.submit(PROMPT, 1)
    world.finish()
    rows = [world.submit(PROMPT[:28] + [100 + each], 3) for each in range(16)]
    world.step()
    assert world.scheduler.stats().num_running == 16
    world.finish()
    assert world.scheduler.stats().num_preemptions == 0
    assert [world.computed[row] for row in (first, *rows)] == [32] + [1 + 2] * 16


def test_w22_who_ends_frees_its_own_blocks_and_leaves_those_of_others() -> None:
    """The last one that shares them sets them free."""
    world = world_of(24)
    rows = [world.submit(PROMPT, 2 + 4 * each) for each in range(4)]
    ended: list[RequestId] = []
    while world.specs:
        world.step()
        held = 24 - world.scheduler.stats().num_free_blocks
        ended = [row for row in rows if row not in world.specs]
        assert (held >= 8) == (len(ended) < 4)
    world.is_clean()
