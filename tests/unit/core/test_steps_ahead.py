"""Steps in which rows have their places before the outcome is known: the same steps, sooner there."""

from __future__ import annotations

import pytest

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
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.booking import ended_rows, tells_only_tokens
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.policies.priority import StrictPriority
from lorax_router.core.request import ANY_TERMS, RequestTerms
from lorax_router.core.scheduler import Scheduler

BLOCK_SIZE = 4


class World:
    """A scheduler, and shards that end rows as they are told; one step is in flight."""

    def __init__(
        self,
        *,
        num_blocks: int = 1000,
        policy: SchedulingPolicy | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        self.scheduler = Scheduler(
            num_blocks=num_blocks, block_size=BLOCK_SIZE, max_step_tokens=64, max_rows=8, depth=1,
            adapters=AdapterTable(max_resident=4), policy=policy, num_host_blocks=num_host_blocks,
        )  # fmt: skip
        self.scheduler.adapters.add(AdapterHandle(1), 1)
        self.now = 0.0
        self.plans: list[StepPlan] = []
        self.steps: list[StepPlan] = []
        self.num_behind = 0
        self._known: dict[int, int] = {}
        self._computed: dict[int, int] = {}
        self._most: dict[int, int] = {}
        self._ended: set[int] = set()

    def submit(
        self,
        number: int,
        num_prompt: int = 6,
        max_new: int = 100,
        terms: RequestTerms = ANY_TERMS,
        like: int | None = None,
    ) -> None:
        """Queue a request that begins like no other, or like that of another number."""
        first = 1000 * (number if like is None else like)
        prompt = range(first, first + num_prompt)
        spec = RequestSpec(
            request_id=RequestId(number), prompt_ids=prompt, sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=max_new),
        )  # fmt: skip
        self._known[number] = num_prompt
        self._most[number] = num_prompt + max_new
        self.scheduler.submit(spec, self.now, terms)

    def send(self) -> None:
        """Send what may be sent, and then give rows their places in the next step."""
        while (plan := self.scheduler.plan(self.now)) is not None:
            self._take(plan)
        self.scheduler.prepare(self.now)
        self.scheduler.check()

    def _take(self, plan: StepPlan) -> None:
        self._computed |= {new.spec.request_id: new.num_cached for new in plan.new_rows}
        self.plans.append(plan)
        self.steps.append(plan)

    def reply(self, ending: frozenset[int] = frozenset()) -> None:
        """Take the oldest step's outcome; of its rows these end."""
        if not self.steps:
            return
        outcome = self.outcome(self.steps.pop(0), ending)
        if tells_only_tokens(outcome):
            plan = self.scheduler.plan_behind(outcome.seq, ended_rows(outcome), self.now)
            if plan is not None:
                self.num_behind += 1
                self._take(plan)
                self.scheduler.check()
        self.scheduler.apply(outcome, self.now)
        self.scheduler.check()
        self.send()

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


def _decoding(num_rows: int = 3, num_blocks: int = 1000, max_new: int = 100) -> World:
    """A world in which so many rows decode, placed ahead, with a step in flight."""
    world = World(num_blocks=num_blocks)
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


def test_a_row_that_ends_leaves_the_step_and_is_dropped_with_it() -> None:
    world = _decoding()
    world.reply(frozenset({2}))
    assert world.num_behind == 1
    assert (world.plans[-1].row_ids, world.plans[-1].drop) == ([1, 3], [2])
    world.reply()
    assert (world.plans[-1].row_ids, world.plans[-1].drop) == ([1, 3], [])


def test_where_all_rows_end_they_are_dropped_at_once() -> None:
    world = _decoding()
    world.reply(frozenset({1, 2, 3}))
    assert world.num_behind == 0
    assert sorted(world.plans[-1].drop) == [1, 2, 3]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_who_is_cancelled_leaves_the_step_with_what_it_takes_of_it(number: int) -> None:
    """With 6 tokens of a prompt each row needs a third block for its ninth: granted with the plan."""
    world = _decoding()
    world.reply()
    ahead, free = world.scheduler._running.ahead, world.scheduler.stats().num_free_blocks
    assert ahead is not None and ahead.num_blocks == 3
    world.scheduler.cancel(RequestId(number))
    assert ahead.num_blocks == 2
    assert world.scheduler.stats().num_free_blocks == free + 2
    world.scheduler.check()
    world.reply()
    assert world.num_behind == 2
    assert len(world.plans[-1].row_ids) == len(world.plans[-1].new_blocks) == 2
    work = world.scheduler._in_flight[-1].work
    assert work is not None and (work.tokens, work.kv_read) == (2, 2 * 9)


def test_rows_that_are_taken_back_are_as_they_were() -> None:
    world = _decoding()
    running = world.scheduler._running
    running.take_back()
    # It stood still in the step before.
    running.requests()[1].last_step -= 1

    def facts() -> list[tuple[int, ...]]:
        return [(r.num_scheduled, r.num_pending, r.last_step) for r in running.requests()]

    before = facts()
    world.scheduler.prepare(0.0)
    assert running.ahead is not None and facts() != before
    running.ahead.take_out(running.requests()[1])
    assert facts()[1] == before[1]
    running.take_back()
    assert facts() == before


def test_who_comes_meanwhile_is_let_into_the_step() -> None:
    world = _decoding()
    world.submit(4)
    world.reply()
    assert world.num_behind == 0
    assert world.plans[-1].row_ids == [1, 2, 3, 4]


def test_a_row_gives_way_at_once_to_who_comes_meanwhile() -> None:
    """Though it had its place: the step is composed as if nobody had one."""
    world = World(num_blocks=10, policy=StrictPriority())
    for number in (1, 2, 3):
        world.submit(number, max_new=12, terms=RequestTerms(priority=1))
    world.send()
    world.reply()
    assert world.scheduler._running.ahead is not None
    world.submit(4, num_prompt=20, max_new=12)
    world.reply()
    assert (world.plans[-1].row_ids, world.plans[-1].drop) == ([1, 2, 4], [3])


def test_who_may_be_too_late_is_looked_at_before_the_next_step() -> None:
    world = World()
    world.submit(1)
    world.submit(2, terms=RequestTerms(deadline=5.0))
    world.send()
    world.reply()
    world.num_behind, world.now = 0, 6.0
    world.reply()
    assert world.num_behind == 0
    assert world.plans[-1].row_ids == [1]


def test_adapters_that_come_are_ordered_with_the_next_step_by_who_runs_then() -> None:
    world = _decoding()
    world.scheduler.adapters.want(AdapterHandle(1), 0.0)
    world.reply()
    assert world.num_behind == 0
    assert world.scheduler.adapter_orders().prepare == [1]


@pytest.mark.parametrize(
    ("ending", "num_host_blocks"), [(frozenset(), 0), (frozenset({1}), 0), (frozenset(), 100)]
)
def test_cached_blocks_make_room_before_an_outcome_is_booked_if_the_same_would_then(
    ending: frozenset[int], num_host_blocks: int
) -> None:
    """What a row leaves behind is taken before them; copies to the host go by prices that it changes."""
    world = World(num_blocks=24, num_host_blocks=num_host_blocks)
    for number in (1, 2, 3, 4):
        world.submit(number, num_prompt=6 if number < 4 else 40, max_new=20)
    world.send()
    world.reply(frozenset({4}))
    running = world.scheduler._running
    while running.pool.num_unused or running.ahead is None or not running.ahead.num_blocks:
        world.reply()
    world.num_behind = 0
    world.reply(ending)
    assert world.num_behind == (not ending and not num_host_blocks)


def test_no_cached_block_makes_room_before_the_same_is_booked_for_another_row() -> None:
    """Row 5 says all that the first did: its block stays out of the index while that one is there."""
    world = World(num_blocks=13)
    world.submit(1, max_new=15)
    world.submit(2, num_prompt=33, max_new=10)
    world.send()
    world.reply()
    world.reply()
    world.reply(frozenset({1}))
    world.submit(5, max_new=15, like=1)
    for _ in range(3):
        world.reply()
    ahead, pool = world.scheduler._running.ahead, world.scheduler._running.pool
    assert ahead is not None and ahead.num_blocks == pool.num_cached == 1
    assert pool.num_unused == 0
    world.num_behind = 0
    world.reply()
    assert world.num_behind == 0


def test_nothing_is_placed_ahead_while_somebody_waits_or_has_a_prompt_to_compute() -> None:
    world = World()
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
