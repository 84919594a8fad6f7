"""A request that ends the shards is found; no other ends by it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from tests.helpers.core_policies import POLICIES
from tests.helpers.swap_world import SwapWorld

from lorax_contract.step import (
    AdapterHandle,
    FinishCode,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StoppingParams,
    TokenColumns,
)
from lorax_router.core.adapters.table import AdapterEvent, AdapterTable
from lorax_router.core.isolation import (
    LOSSES_ALONE,
    LOSSES_PREPARING,
    LOSSES_TOGETHER,
    ShardsLost,
)
from lorax_router.core.scheduler import Scheduler

MOST_LOSSES = LOSSES_TOGETHER + LOSSES_ALONE


class DeadlyWorld(SwapWorld):
    """Some requests end the shards when they have so many tokens in the cache."""

    def __init__(self, **options: Any) -> None:
        super().__init__(num_host_blocks=0, **options)
        self.deadly: dict[RequestId, int] = {}
        self.ended: dict[RequestId, str] = {}
        self.num_losses = 0
        # Tokens that each row of the shards has.
        self._done: Counter[RequestId] = Counter()

    def step(self) -> None:
        """As usual, but for steps that nobody survives."""
        while (plan := self.scheduler.plan(0.0)) is not None:
            self.plans.append(plan)
        if not self.plans:
            return
        plan = self.plans[0]
        self._done.update({row.spec.request_id: row.num_cached for row in plan.new_rows})
        for row, num in zip(plan.row_ids, plan.num_tokens, strict=True):
            self._done[row] += num
        if any(self._done[row] >= self.deadly.get(row, 10**9) for row in plan.row_ids):
            self._done.clear()
            self.num_losses += 1
            self.ended |= self.lose_shards()
        else:
            for row in plan.drop:
                del self._done[row]
            super().step()


def deadly_world(seed: int, **options: Any) -> DeadlyWorld:
    """Return a world of 12 requests, some of them long."""
    draw = random.Random(seed)
    world = DeadlyWorld(num_blocks=80, max_rows=draw.choice([3, 8]), **options)
    for number in range(12):
        num_prompt = draw.choice([3, 9, 40, 130])
        prompt = [(number * 7 + each) % 900 for each in range(num_prompt)]
        world.submit(prompt, draw.randint(1, 12))
    return world


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(4))
def test_whoever_ends_the_shards_ends_alone(seed: int, policy: str, depth: int) -> None:
    """Wherever in its life it does so; all others have the tokens that they would have had."""
    table = AdapterTable(max_resident=1)
    world = deadly_world(seed, depth=depth, policy=POLICIES[policy](table))
    draw = random.Random(seed)
    request_id = draw.choice(sorted(world.specs))
    spec = world.specs[request_id]
    world.deadly[request_id] = draw.randint(1, spec.num_kv_tokens)
    world.finish()
    assert world.ended.keys() == {request_id}
    assert "2 times of them with no other beside it" in world.ended[request_id]
    assert world.num_losses <= MOST_LOSSES


@pytest.mark.parametrize("seed", range(6))
def test_several_that_end_the_shards_are_found_one_after_the_other(seed: int) -> None:
    """Each costs two losses when it is alone; those before that they may share."""
    world = deadly_world(seed)
    draw = random.Random(seed)
    for request_id in draw.sample(sorted(world.specs), 3):
        world.deadly[request_id] = draw.randint(1, world.specs[request_id].num_kv_tokens)
    world.finish()
    assert world.ended.keys() == world.deadly.keys()
    assert world.num_losses <= 3 * MOST_LOSSES


def test_who_gets_beyond_where_it_was_is_like_all_others_again() -> None:
    """Losses far from each other add up to nothing."""
    world = DeadlyWorld()
    world.submit([1, 2, 3], 25)
    for _ in range(6):
        for _ in range(5):
            world.step()
        assert not world.lose_shards()
    world.finish()


def test_one_loss_costs_nobody_company() -> None:
    """All that ran are computed again together."""
    world = DeadlyWorld()
    for number in range(4):
        world.submit([1, 2, number], 8)
    world.step()
    world.lose_shards()
    world.step()
    assert len(world.executed[-1].row_ids) == 4
    world.finish()


def test_who_is_to_be_alone_waits_for_blocks_and_nobody_enters_before_it() -> None:
    """The rows that run go on, so that there will be some."""
    world = SwapWorld(num_blocks=20, num_host_blocks=0)
    for number in range(3):
        world.submit([number, 1, 2, 3, 4, 5, 6], 9)
    for num_blocks in (20, 5):
        assert world.scheduler.plan(0.0) is not None
        assert not world.lose_shards(num_blocks)
    late = world.submit([7], 1)
    entered = []
    while world.specs:
        world.step()
        plan = world.executed[-1]
        entered += [row.spec.request_id for row in plan.new_rows]
    assert Counter(entered).keys() == {1, 2, 3, late}
    assert entered.index(late) == 3


class Core:
    """A scheduler with one adapter, whose rows all get tokens, or are lost."""

    def __init__(self, num_blocks: int, **options: Any) -> None:
        self.num_blocks = num_blocks
        self.table = AdapterTable(max_resident=1, **options)
        self.table.add(AdapterHandle(1), 1)
        self.scheduler = Scheduler(
            num_blocks=num_blocks, block_size=4, max_step_tokens=64, max_rows=4, adapters=self.table
        )
        self.now = 0.0

    def submit(self, number: int, num_prompt: int = 2, max_new: int = 4, adapter: int = 0) -> None:
        spec = RequestSpec(
            request_id=RequestId(number), prompt_ids=[number * 100 + n for n in range(num_prompt)],
            sampling=SamplingParams(), stopping=StoppingParams(max_new_tokens=max_new),
            adapter=AdapterHandle(adapter),
        )  # fmt: skip
        self.scheduler.submit(spec, self.now)

    def planned(self) -> list[int]:
        plan = self.scheduler.plan(self.now)
        self.scheduler.check()
        return [] if plan is None else list(plan.row_ids)

    def let_adapter_come(self) -> None:
        orders = self.scheduler.adapter_orders()
        assert orders.prepare == [1]
        self.scheduler.adapter_event(
            AdapterHandle(1), AdapterEvent.PREPARED, self.now, epoch=orders.epoch
        )

    def answer(self) -> None:
        """Let the oldest step be computed."""
        step = self.scheduler._in_flight[0]
        rows = [row.request for row in step.rows if row.reports]
        is_last = [len(r.output_ids) + 1 == r.spec.stopping.max_new_tokens for r in rows]
        finish = [FinishCode.LENGTH if each else FinishCode.RUNNING for each in is_last]
        outcome = StepOutcome(
            step.seq, row_ids=[each.request_id for each in rows], num_tokens=[1] * len(rows),
            finish=finish, tokens=TokenColumns(ids=[5] * len(rows)),
        )  # fmt: skip
        self.scheduler.apply(outcome, self.now)
        self.scheduler.check()

    def lose(self) -> ShardsLost:
        return self.scheduler.shards_lost(
            self.now, epoch=self.scheduler.epoch + 1, num_blocks=self.num_blocks, adapter_bytes=None
        )


def test_who_waits_for_its_adapter_keeps_nobody_from_running() -> None:
    """It is alone when its adapter is there, and what is in flight is done."""
    core = Core(20)
    core.submit(1, adapter=1)
    core.submit(2)
    for _ in range(LOSSES_TOGETHER):
        assert core.planned() == [2]
        core.let_adapter_come()
        assert sorted(core.planned()) == [1, 2]
        assert not core.lose().ended
    core.scheduler.cancel(RequestId(2))
    core.submit(3)
    assert core.planned() == [3]
    core.let_adapter_come()
    assert core.planned() == []


def test_where_blocks_just_suffice_the_last_steps_need_no_more() -> None:
    """They are planned before it is known that the request is beyond where it was."""
    core = Core(10)
    core.submit(1, 8, 16, adapter=1)
    core.submit(9, 2, 20)
    for _ in range(LOSSES_TOGETHER):
        core.planned()
        core.let_adapter_come()
        core.planned()
        assert not core.lose().ended
    core.scheduler.cancel(RequestId(9))
    core.submit(3, 30, 2)
    assert core.planned() == [3]
    core.let_adapter_come()
    while 1 not in core.planned():
        core.answer()
    for _ in range(4):
        core.planned()


def test_an_adapter_whose_preparation_ends_the_shards_is_found_and_no_row_is_blamed() -> None:
    """Rows that are alone at such losses are not to blame for them."""
    core = Core(100)
    for number in (1, 2, 3):
        core.submit(number, 8, 40)
    core.submit(7, adapter=1)
    for number in range(LOSSES_PREPARING):
        core.planned()
        # Not before all rows are beyond where they were: nothing else is done beside them until then.
        while not (orders := core.scheduler.adapter_orders()).prepare:
            core.answer()
            core.planned()
        assert orders.prepare == [1]
        lost = core.lose()
        assert lost.ended.keys() == ({7} if number == LOSSES_PREPARING - 1 else set())
    assert "prepared its adapter" in lost.blamed[RequestId(7)]
    core.planned()
    assert core.scheduler.adapter_orders().prepare == []


def test_an_adapter_that_came_meanwhile_begins_anew() -> None:
    core = Core(100)
    core.submit(1, 8, 40, adapter=1)
    for _ in range(2 * LOSSES_PREPARING):
        core.planned()
        if core.scheduler.adapter_orders().prepare:
            assert not core.lose().ended
        core.planned()
        core.let_adapter_come()
        core.planned()
        core.answer()
        assert not core.lose().ended


def test_the_turn_of_its_adapter_does_not_end_while_a_request_is_alone() -> None:
    """Otherwise others would be computed beside the step that it has in flight."""
    core = Core(40, cycle_time_s=1.0)
    core.table.add(AdapterHandle(2), 1)
    core.submit(1, 30, 8, adapter=1)
    core.submit(9)
    for _ in range(LOSSES_TOGETHER):
        core.planned()
        core.let_adapter_come()
        while 1 not in core.planned():
            core.answer()
        assert not core.lose().ended
    core.scheduler.cancel(RequestId(9))
    core.planned()
    core.let_adapter_come()
    assert core.planned() == [1]
    core.submit(2, adapter=2)
    core.submit(3)
    for _ in range(4):
        core.now += 10.0
        assert set(core.planned()) <= {1}
    core.answer()
