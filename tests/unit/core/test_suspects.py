"""A pass that failed computed nothing: its rows are planned again in halves, and only one ends."""

from __future__ import annotations

import random

import pytest
from tests.helpers.core_policies import POLICIES, make_table
from tests.helpers.swap_world import SwapWorld

from lorax_contract.step import RequestId

DEPTHS = [1, 2, 3]


def crowd(depth: int, num_rows: int = 8, **options: object) -> SwapWorld:
    """Return a world in which so many rows decode."""
    world = SwapWorld(256, num_host_blocks=0, depth=depth, max_rows=32, **options)  # type: ignore[arg-type]
    for number in range(num_rows):
        world.submit([number] * 5, 12)
    for _ in range(4):
        world.step()
    assert all(world.received.values())
    return world


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("place", range(8))
def test_whoever_fails_alone_ends_and_all_others_go_on(depth: int, place: int) -> None:
    world = crowd(depth)
    culprit = RequestId(1 + place)
    world.harmful.add(culprit)
    before = list(world.received[culprit])
    world.finish()
    # Of eight rows, four, two, and alone.
    computed = [len(plan.row_ids) for plan in world.failed]
    assert computed == [8, 4, 2, 1]
    assert len(world.received[culprit]) <= len(before) + depth
    assert all(len(ids) == 12 for row, ids in world.received.items() if row != culprit)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_pass_that_fails_once_costs_two_more_and_no_row(depth: int) -> None:
    world = crowd(depth)
    once = [True]
    world.fails = lambda plan: bool(plan.row_ids) and once.pop() if once else False
    world.finish()
    assert len(world.failed) == 1
    (failed,) = world.failed
    again = [
        plan for plan in world.executed
        if plan.new_rows and plan.seq > failed.seq
    ]  # fmt: skip
    assert [len(plan.row_ids) for plan in again] == [4, 4]
    assert sorted(row for plan in again for row in plan.row_ids) == sorted(failed.row_ids)
    assert all(len(ids) == 12 for ids in world.received.values())


@pytest.mark.parametrize("depth", DEPTHS)
def test_each_half_computes_what_its_rows_were_to_compute(depth: int) -> None:
    world = crowd(depth, 6)
    # Prompts beside decodes, one of them in chunks: blocks for them are granted once.
    world.submit([7] * 90, 3)
    world.submit([9] * 30, 3)
    tokens: dict[int, int] = {}
    once = [True]

    def fails(plan: object) -> bool:
        if not once or max(plan.num_tokens, default=0) < 2:  # type: ignore[attr-defined]
            return False
        once.pop()
        tokens.update(zip(plan.row_ids, plan.num_tokens, strict=True))  # type: ignore[attr-defined]
        return True

    world.fails = fails
    world.finish()
    (failed,) = world.failed
    assert max(tokens.values()) > 1
    again = [plan for plan in world.executed if plan.new_rows and plan.seq > failed.seq][:2]
    assert {
        row: num for plan in again for row, num in zip(plan.row_ids, plan.num_tokens, strict=True)
    } == tokens


@pytest.mark.parametrize("depth", DEPTHS)
def test_others_wait_for_one_step_of_suspects_and_no_longer(depth: int) -> None:
    world = crowd(depth, 16)
    world.harmful.add(RequestId(3))
    while not world.failed:
        world.step()
    bystanders = {world.submit([100 + number], 40) for number in range(3)}
    start = len(world.executed)
    world.finish()
    last = max(i for i, plan in enumerate(world.executed) if plan in world.failed)
    steps = [bystanders & set(plan.row_ids) for plan in world.executed[start : last + 1]]
    first = next(i for i, rows in enumerate(steps) if rows)
    assert len(steps) - first > 3
    for one, other in zip(steps[first:], steps[first + 1 :], strict=False):
        assert one or other
    # And they were in no pass that failed.
    assert not any(bystanders & set(plan.row_ids) for plan in world.failed)


@pytest.mark.parametrize("depth", DEPTHS)
def test_suspects_may_leave_at_any_time(depth: int) -> None:
    for leaving in range(1, 9):
        for num_steps in range(10):
            world = crowd(depth)
            world.harmful.add(RequestId(4))
            while not world.failed:
                world.step()
            for _ in range(num_steps):
                world.step()
            if RequestId(leaving) in world.specs:
                world.cancel(RequestId(leaving))
            world.finish()
            left = [len(ids) for row, ids in world.received.items() if row not in (4, leaving)]
            assert left == [12] * len(left)


@pytest.mark.parametrize("depth", DEPTHS)
def test_suspects_give_way_to_nobody(depth: int) -> None:
    """While it is not known who is to blame, the latest keeps what it has though others need it.

    Else it would come back, and those that it is computed with then would fail once more.
    """
    for num_tokens in range(1, 12):
        world = SwapWorld(12, num_host_blocks=0, depth=depth, max_rows=8)
        for number in range(4):
            world.submit([number] * 6, 18)
        while len(world.received[RequestId(4)]) < num_tokens and not num_preempted(world):
            world.step()
        if num_preempted(world):
            break
        world.harmful.add(RequestId(4))
        world.finish()
        sizes = [len(plan.row_ids) for plan in world.failed]
        assert sizes == [-(-sizes[0] // 2**number) for number in range(len(sizes))]
        assert sizes[-1] == 1
        assert {len(ids) for row, ids in world.received.items() if row != 4} == {18}
    # The first of these had room to grow, the last had none.
    assert 2 < num_tokens < 11


def num_preempted(world: SwapWorld) -> int:
    """Return how many gave way so far."""
    return world.scheduler.stats().num_preemptions


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_lost_shard_ends_all_suspicion(depth: int) -> None:
    world = crowd(depth)
    world.harmful.add(RequestId(4))
    while len(world.failed) < 2:
        world.step()
    world.lose_shards()
    world.harmful.clear()
    world.finish()
    assert {len(ids) for ids in world.received.values()} == {12}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("num_host_blocks", [0, 24])
def test_whatever_fails_each_row_has_its_tokens_or_its_error(
    depth: int, policy: str, num_host_blocks: int
) -> None:
    """Passes fail at random and with some rows always, in a pool that is too small for all."""
    num_failed = num_preempted = 0
    for seed in range(3):
        rng = random.Random(f"{seed} {depth} {policy}")
        world = SwapWorld(
            14, num_host_blocks=num_host_blocks, depth=depth, max_rows=6,
            policy=POLICIES[policy](make_table(1)), keeps_evicted=bool(seed % 2),
        )  # fmt: skip
        world.fails = lambda plan, rng=rng: rng.random() < 0.15  # type: ignore[misc]
        world.load(24, rng)
        world.harmful |= {RequestId(number) for number in range(1, 25) if rng.random() < 0.15}
        for number in range(1, 25, 7):
            for _ in range(rng.randrange(12)):
                world.step()
            if RequestId(number) in world.specs:
                world.cancel(RequestId(number))
        world.finish()
        num_failed += len(world.failed)
        num_preempted += world.scheduler.stats().num_preemptions
    assert num_failed > 25
    assert num_preempted > 0 or policy == "lorax"


@pytest.mark.parametrize("depth", DEPTHS)
def test_passes_are_few_whoever_is_to_blame(depth: int) -> None:
    """Each of them costs no more than two passes for each halving, and one."""
    rng = random.Random(depth)
    for num_rows in (1, 2, 3, 7, 16, 27):
        for num_harmful in (1, 2, 3):
            world = crowd(depth, num_rows)
            numbers = rng.sample(range(1, num_rows + 1), min(num_harmful, num_rows))
            world.harmful |= {RequestId(number) for number in numbers}
            world.finish()
            halvings = (num_rows - 1).bit_length()
            assert len(world.failed) <= len(numbers) * (halvings + 1)
            assert {len(world.received[RequestId(n)]) == 12 for n in numbers} == {False}
