"""Steps in which rows have their places before the outcome is known: the same steps, sooner there."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_contract.step import (
    AdapterHandle,
    FinishCode,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
    TokenColumns,
)
from lorax_router.core.adapters.table import AdapterEvent, AdapterTable
from lorax_router.core.booking import ended_rows, tells_only_tokens
from lorax_router.core.scheduler import Scheduler

BLOCK_SIZE = 4
HANDLES = (0, 1, 2)


class World:
    """A scheduler, and shards that end rows as they are told.

    Args:
        is_ahead: rows have their places beforehand, as the engine loop does it.
    """

    def __init__(self, *, is_ahead: bool, depth: int = 1, num_blocks: int = 1000) -> None:
        self.is_ahead = is_ahead
        adapters = AdapterTable(max_resident=4)
        self.scheduler = Scheduler(
            num_blocks=num_blocks, block_size=BLOCK_SIZE, max_step_tokens=64, max_rows=8,
            depth=depth, adapters=adapters,
        )  # fmt: skip
        for handle in HANDLES[1:]:
            adapters.add(AdapterHandle(handle), 1)
        self.plans: list[StepPlan] = []
        self.steps: list[StepPlan] = []
        self.num_behind = 0
        self._known: dict[int, int] = {}
        self._computed: dict[int, int] = {}
        self._most: dict[int, int] = {}
        self._ended: set[int] = set()

    def submit(self, number: int, num_prompt: int = 6, max_new: int = 100, handle: int = 0) -> None:
        """Queue a request that begins like no other."""
        prompt = range(1000 * number, 1000 * number + num_prompt)
        spec = RequestSpec(
            request_id=RequestId(number), prompt_ids=prompt, sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=max_new), adapter=AdapterHandle(handle),
        )  # fmt: skip
        self._known[number], self._computed[number] = num_prompt, 0
        self._most[number] = num_prompt + max_new
        self.scheduler.submit(spec, 0.0)

    def settle_adapters(self) -> None:
        """Adapters are there at once."""
        orders = self.scheduler.adapter_orders()
        for event, handles in (
            (AdapterEvent.PREPARED, orders.prepare),
            (AdapterEvent.RELEASED, orders.release),
        ):
            for handle in handles:
                self.scheduler.adapter_event(handle, event, 0.0, epoch=1)

    def send(self) -> None:
        """Send what may be sent, and then give rows their places in the next step."""
        while (plan := self.scheduler.plan(0.0)) is not None:
            self._take(plan)
            self.settle_adapters()
        if self.is_ahead:
            self.scheduler.prepare(0.0)
        self.scheduler.check()

    def _take(self, plan: StepPlan) -> None:
        self.plans.append(replace(plan))
        self.steps.append(plan)

    def reply(self, ending: frozenset[int] = frozenset()) -> None:
        """Take the oldest step's outcome; of its rows these end."""
        if not self.steps:
            return
        outcome = self.outcome(self.steps.pop(0), ending)
        if self.is_ahead and tells_only_tokens(outcome):
            plan = self.scheduler.plan_behind(outcome.seq, ended_rows(outcome), 0.0)
            if plan is not None:
                self.num_behind += 1
                self._take(plan)
                self.scheduler.check()
        self.scheduler.apply(outcome, 0.0)
        self.scheduler.check()
        self.send()

    def dropped(self) -> set[int]:
        """Return the rows that were dropped."""
        return {row for plan in self.plans for row in plan.drop}

    def outcome(self, plan: StepPlan, ending: frozenset[int] = frozenset()) -> StepOutcome:
        """Compute a step: a token for each row that has computed all that it knows."""
        rows = []
        for row, num in zip(plan.row_ids, plan.num_tokens, strict=True):
            if row in self._ended:
                continue
            self._computed[row] += num
            if self._computed[row] == self._known[row]:
                self._known[row] += 1
                rows.append(row)
        over = {row for row in rows if row in ending or self._known[row] == self._most[row]}
        self._ended |= over
        finish = [FinishCode.EOS_TOKEN if row in over else FinishCode.RUNNING for row in rows]
        num = len(rows)
        tokens = TokenColumns([7] * num, [0.0] * num, [""] * num, [False] * num)
        return StepOutcome(plan.seq, rows, [1] * num, finish, tokens)

    def decided(self) -> list[object]:
        """Return what was planned, but for which blocks it was, and when rows were dropped."""
        return [
            (
                plan.seq, plan.row_ids, plan.num_tokens, plan.num_new_blocks, plan.activate,
                plan.deactivate, [new.spec.request_id for new in plan.new_rows],
            )
            for plan in self.plans
        ]  # fmt: skip


def _play(world: World, seed: int, num_steps: int) -> None:
    """Requests come, end and are cancelled: mostly nothing happens for a while."""
    rng, number = Random(seed), 0
    for _ in range(num_steps):
        if rng.random() < 0.3 and number < 40:
            number += 1
            world.submit(number, rng.randrange(1, 90), rng.randrange(1, 40), rng.choice(HANDLES))
        if not world.steps:
            world.send()
        if rng.random() < 0.1 and number:
            world.scheduler.cancel(RequestId(rng.randrange(1, number + 1)))
        if rng.random() < 0.1:
            number += 1
            world.submit(number, rng.randrange(1, 9), rng.randrange(1, 40))
        ending = frozenset(each for each in range(1, number + 1) if rng.random() < 0.02)
        world.reply(ending)


@given(seed=st.integers(0, 2**32), depth=st.integers(1, 3))
def test_plans_are_the_same_as_without(seed: int, depth: int) -> None:
    """Whoever comes, ends or leaves, in the same steps as if nothing was placed ahead."""
    ahead, plain = World(is_ahead=True, depth=depth), World(is_ahead=False, depth=depth)
    for world in (ahead, plain):
        _play(world, seed, 60)
    assert ahead.decided() == plain.decided()
    while ahead.steps:
        ahead.reply()
    assert ahead.dropped() >= plain.dropped()


def _decoding(num_rows: int = 3, num_blocks: int = 1000, max_new: int = 100) -> World:
    """A world in which so many rows decode, placed ahead, with a step in flight."""
    world = World(is_ahead=True, num_blocks=num_blocks)
    for number in range(1, num_rows + 1):
        world.submit(number, max_new=max_new)
    world.send()
    world.reply()
    world.num_behind = 0
    return world


def test_where_all_go_on_the_next_step_does_not_wait_for_the_outcome() -> None:
    world = _decoding()
    for _ in range(20):
        world.reply()
    assert world.num_behind == 20
    assert all(plan.row_ids == [1, 2, 3] for plan in world.plans)


def test_a_row_that_ends_leaves_the_step_and_is_dropped_with_the_next_one() -> None:
    world = _decoding()
    world.reply(frozenset({2}))
    assert world.num_behind == 1
    assert world.plans[-1].row_ids == [1, 3]
    world.reply()
    assert world.plans[-1].row_ids == [1, 3]
    assert world.plans[-1].drop == [2]


def test_where_all_rows_end_they_are_dropped_at_once() -> None:
    world = _decoding()
    world.reply(frozenset({1, 2, 3}))
    assert world.num_behind == 0
    assert sorted(world.plans[-1].drop) == [1, 2, 3]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_who_is_cancelled_leaves_the_step_with_its_new_block(number: int) -> None:
    """With 6 tokens of a prompt each row needs a third block for its ninth."""
    world = _decoding()
    world.reply()
    ahead = world.scheduler._running.ahead
    assert ahead is not None and ahead.plan.num_new_blocks == [1, 1, 1]
    work, free = ahead.work, world.scheduler.stats().num_free_blocks
    world.scheduler.cancel(RequestId(number))
    assert len(ahead.plan.row_ids) == len(ahead.plan.new_blocks) == 2
    assert ahead.work.tokens == work.tokens - 1
    assert ahead.work.kv_read == work.kv_read * 2 // 3
    assert world.scheduler.stats().num_free_blocks == free + 3
    world.scheduler.check()
    world.reply()
    assert world.num_behind == 2


def test_who_comes_meanwhile_is_let_into_the_step() -> None:
    world = _decoding()
    world.submit(4)
    world.reply()
    assert world.num_behind == 0
    assert world.plans[-1].row_ids == [1, 2, 3, 4]


def test_nothing_is_placed_ahead_while_somebody_waits_or_has_a_prompt_to_compute() -> None:
    world = World(is_ahead=True)
    world.submit(1)
    world.submit(2, num_prompt=100)
    world.send()
    assert world.scheduler._running.ahead is None
    world = _decoding(8)
    world.submit(9)
    world.reply()
    assert world.scheduler._running.ahead is None


def test_nothing_is_placed_ahead_for_which_blocks_are_too_few() -> None:
    """Somebody would have to give way, and it may be that another ends before."""
    world = _decoding(2, num_blocks=5, max_new=12)
    assert world.scheduler._running.ahead is not None
    world.reply()
    assert world.scheduler._running.ahead is None
    world.reply()


def test_a_failed_pass_takes_all_back() -> None:
    world = _decoding()
    outcome = StepOutcome(world.steps.pop(0).seq, failed=[RequestId(1), RequestId(2), RequestId(3)])
    assert not tells_only_tokens(outcome)
    world.scheduler.apply(outcome, 0.0)
    assert world.scheduler._running.ahead is None
    world.scheduler.check()
    free = world.scheduler.stats().num_free_blocks
    assert free == 1000 - 6


def test_lost_shards_take_the_step_with_them() -> None:
    world = _decoding()
    world.scheduler.shards_lost(0.0, epoch=2, num_blocks=50, adapter_bytes=None)
    world.scheduler.check()
    plan = world.scheduler.plan(0.0)
    assert plan is not None and plan.seq == 1 and len(plan.new_rows) == 3
