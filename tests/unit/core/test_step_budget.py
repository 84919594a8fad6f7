"""What a step may take, and who takes turns in it: nothing starves, no budget is exceeded."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from tests.helpers.core_world import CoreWorld

from lorax_contract.step import AdapterHandle, StepOutcome, StepPlan
from lorax_router.core.composition import MAX_PROMPT_STEPS
from lorax_router.core.cost import LinearCost, StepWork
from lorax_router.core.policies.lorax import OldestHead
from lorax_router.core.policies.priority import StrictPriority
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.request import RequestTerms
from lorax_router.core.step_builder import LEAST_CHUNK, LONG_PART

ANYBODY = RequestTerms()
COST = LinearCost(0.010, 1e-4, 1e-6)


class BudgetWorld(CoreWorld):
    """Remembers what each step computed and read; a step takes what ``cost`` says."""

    def __init__(self, cost: LinearCost = COST, **values: Any) -> None:
        values.setdefault("policy", FirstComeFirstServed())
        super().__init__(values.pop("policy"), **values)
        self.cost = cost
        # Of each step: as it was computed, and as the scheduler counted it.
        self.works: list[tuple[StepWork, StepWork | None]] = []
        # By step: the tokens of each row, and what each read.
        self.steps: list[dict[int, int]] = []
        self.reads: list[dict[int, int]] = []
        self.seconds: list[float] = []
        self.first_token: dict[int, float] = {}
        self._ranks: dict[int, int] = {}

    def _outcome(self, plan: StepPlan) -> StepOutcome:
        outcome = super()._outcome(plan)
        if not plan.row_ids:
            return outcome  # somebody left, and that is all
        self.steps.append(dict(zip(plan.row_ids, plan.num_tokens, strict=True)))
        self.reads.append({row: self._computed[row] for row in plan.row_ids})
        for new in plan.new_rows:
            adapter = new.spec.adapter
            self._ranks[new.spec.request_id] = self.adapters[adapter].rank if adapter else 0
        ranks = sum(num * self._ranks[row] for row, num in self.steps[-1].items())
        attended = sum(
            num * self.reads[-1][row] - num * (num - 1) // 2 for row, num in self.steps[-1].items()
        )
        reads = sum(self.reads[-1].values())
        work = StepWork(sum(plan.num_tokens), reads, 0, ranks, attended)
        self.works.append((work, self.scheduler._in_flight[0].work))
        self.seconds.append(self.cost.seconds(work))
        outcome.total_ns = int(1e9 * self.seconds[-1])
        for row in outcome.row_ids:
            self.first_token.setdefault(row, self.now)
        return outcome

    def ask(self, num_prompt: int, num_output: int = 4, terms: RequestTerms = ANYBODY) -> int:
        """Queue a request."""
        return self.submit(terms, num_prompt, num_output)

    def gaps_of(self, number: int) -> int:
        """Return the most steps between two in which a request was computed."""
        steps = [index for index, step in enumerate(self.steps) if number in step]
        return max(later - earlier for earlier, later in pairwise(steps))


def kinds(world: BudgetWorld) -> str:
    """Return a letter for each step: prompts, decodes, or a mix."""
    return "".join(
        "m" if min(step.values()) == 1 < max(step.values()) else "d" if max(step.values()) == 1 else "p"
        for step in world.steps
    )  # fmt: skip


# --- modes ----------------------------------------------------------------------------


def test_mixed_steps_hold_prompts_and_decodes() -> None:
    world = BudgetWorld(max_step_tokens=16)
    world.ask(8, 6)
    world.step()
    world.ask(30, 2)
    world.run_until_idle()
    assert kinds(world) == "pmmddd"


def test_each_token_counts_with_what_it_attends_to() -> None:
    """Of a chunk, and of a row that decodes, in a block that it has or in a new one."""
    world = BudgetWorld(max_step_tokens=16)
    world.ask(8, 40)
    world.step()
    world.ask(30, 20)
    world.run_until_idle()
    assert all(computed == counted for computed, counted in world.works)


def test_prompts_first_lets_decodes_wait_for_all_prompts() -> None:
    world = BudgetWorld(max_step_tokens=16, batching="prefill")
    world.ask(8, 4)
    world.step()
    world.ask(30, 2)
    world.ask(10, 2)
    world.run_until_idle()
    assert kinds(world) == "ppppddd"


def test_decodes_first_lets_prompts_wait_for_all_decodes() -> None:
    world = BudgetWorld(max_step_tokens=16, batching="decode")
    world.ask(8, 4)
    world.step()
    world.ask(30, 2)
    world.run_until_idle()
    assert kinds(world) == "pdddppd"


def test_prompts_without_end_do_not_starve_a_decode() -> None:
    """Each new prompt ends with its first token, so that there is always a row for the next."""
    world = BudgetWorld(max_step_tokens=16, batching="prefill")
    first = world.ask(8, 6)
    world.step()
    while first not in world.ended:
        world.ask(16, 1)
        world.step()
        assert len(world.steps) < 400
    assert world.gaps_of(first) == MAX_PROMPT_STEPS + 1


def test_decodes_without_end_do_not_starve_a_prompt() -> None:
    world = BudgetWorld(max_step_tokens=16, batching="decode", max_waiting_tokens=5)
    world.ask(4, 500)
    world.step()
    later = world.ask(40, 2)
    world.step(30)
    assert later in world.first_token
    assert kinds(world).startswith("pdddddpdddddpdddddp")


@pytest.mark.parametrize("batching", ["mixed", "prefill", "decode"])
def test_a_mode_changes_the_order_of_work_and_not_its_amount(batching: str) -> None:
    world = BudgetWorld(max_step_tokens=16, batching=batching, num_blocks=40)
    for number in range(12):
        world.ask(5 + 7 * number % 60, 1 + number)
    world.run_until_idle()
    assert all(world.tokens[number] == 1 + (number - 1) for number in world.tokens)
    assert all(sum(step.values()) <= 16 for step in world.steps)


# --- what is read -----------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["mixed", "prefill", "decode"])
def test_no_step_reads_more_than_the_budget_unless_for_one_row(batching: str) -> None:
    world = BudgetWorld(max_kv_read=100, max_rows=8, batching=batching)
    numbers = [world.ask(prompt, 20) for prompt in (60, 60, 90, 150, 10, 10, 30, 5)]
    world.run_until_idle(2000)
    for reads in world.reads:
        assert sum(reads.values()) <= 100 or len(reads) == 1
    assert all(world.tokens[number] == 20 for number in numbers)


def test_rows_take_turns_where_reads_do_not_suffice() -> None:
    world = BudgetWorld(max_kv_read=100, max_rows=8)
    numbers = [world.ask(60, 20) for _ in range(4)]
    world.run_until_idle(2000)
    # One of them at a time: each waits for the others.
    assert max(world.gaps_of(number) for number in numbers) <= 2 * len(numbers)


def test_a_budget_that_suffices_changes_nothing() -> None:
    plans = []
    for most in (None, 10_000):
        world = BudgetWorld(max_kv_read=most, max_step_tokens=16)
        for number in range(6):
            world.ask(3 + 9 * number, 5)
        world.run_until_idle()
        plans.append([dict(sorted(step.items())) for step in world.steps])
    assert plans[0] == plans[1]


# --- long prompts -------------------------------------------------------------------------


def long_and_short(num_long: int = 1, **limits: Any) -> tuple[BudgetWorld, list[int], list[int]]:
    """Long prompts of 40 steps, then a short one in each step."""
    world = BudgetWorld(max_step_tokens=32, max_rows=32, num_blocks=4000, **limits)
    long = [world.ask(32 * 40, 2) for _ in range(num_long)]
    short = []
    for _ in range(40):
        world.step()
        short.append(world.ask(10, 2))
    return world, long, short


def test_short_prompts_slip_past_a_long_one() -> None:
    world, (long,), short = long_and_short()
    asked = dict(zip(short, range(1, 41), strict=True))
    world.run_until_idle()
    assert max(world.first_token[each] - asked[each] for each in short) <= 2
    # The long one had at least half of each step.
    assert world.first_token[long] <= 2 * 40 + 2


def test_a_long_prompt_alone_has_all_of_a_step() -> None:
    world = BudgetWorld(max_step_tokens=32)
    number = world.ask(32 * 10, 1)
    world.run_until_idle()
    assert [step[number] for step in world.steps] == [32] * 10


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_long_prompts_run_than_may(most: int) -> None:
    world, long, _ = long_and_short(4, max_partial_prompts=most)
    world.run_until_idle()
    for step in world.steps:
        assert sum(number in long for number in step if step[number] > 1) <= most + 1
    starts = [next(i for i, step in enumerate(world.steps) if each in step) for each in long]
    ends = [world.first_token[each] for each in long]
    assert all(start >= sorted(ends)[i] - 1 for i, start in enumerate(starts[most:]))


def test_a_long_prompt_that_waits_for_another_is_not_starved_by_short_ones() -> None:
    """Short ones come for ever: each long one has half of the steps that it would need alone."""
    world = BudgetWorld(max_step_tokens=32, max_rows=32, num_blocks=4000)
    long = [world.ask(32 * 20, 1) for _ in range(3)]
    while any(each not in world.first_token for each in long):
        for _ in range(4):
            world.ask(12, 1)
        world.step()
        assert len(world.steps) <= 2 * 3 * 20 + 6
    assert sorted(long, key=world.first_token.__getitem__) == long


def test_many_waiting_long_prompts_do_not_hide_short_ones() -> None:
    world = BudgetWorld(max_step_tokens=32, max_rows=32, num_blocks=4000)
    for _ in range(40):
        world.ask(32 * 4, 1)
    short = world.ask(10, 1)
    world.step(3)
    assert short in world.first_token


def test_an_urgent_long_prompt_does_not_wait_for_one_of_a_worse_class() -> None:
    world = BudgetWorld(policy=StrictPriority(), max_step_tokens=32, num_blocks=4000)
    slow = world.ask(32 * 40, 1, RequestTerms(priority=5))
    world.step(2)
    urgent = world.ask(32 * 4, 1, RequestTerms(priority=0))
    world.run_until_idle()
    assert world.first_token[urgent] <= 2 + 2 * 4 + 1
    assert world.first_token[slow] > world.first_token[urgent]


# --- the time between tokens ----------------------------------------------------------------


def paced(target_s: float | None, **limits: Any) -> BudgetWorld:
    """Rows that decode all the time, and prompts that come all the time."""
    world = BudgetWorld(
        max_step_tokens=1024, max_rows=8, num_blocks=20_000, target_itl_s=target_s, **limits
    )
    for _ in range(4):
        world.ask(20, 400)
    for number in range(200):
        if number % 3 == 0:
            world.ask(300 + 61 * number % 900, 2)
        world.step()
    return world


def test_chunks_are_as_large_as_the_target_allows() -> None:
    world = paced(0.030)
    late = world.seconds[60:]
    # What comes in small is fitted first: a few steps may miss.
    assert sorted(late)[int(0.98 * len(late))] <= 0.030 * 1.05
    busy = [
        seconds
        for seconds, step in zip(late, world.steps[60:], strict=True)
        if max(step.values()) > 16
    ]
    assert sum(busy) / len(busy) >= 0.8 * 0.030
    assert max(paced(None).seconds[60:]) > 0.080


def test_prompts_move_on_where_no_chunk_meets_the_target() -> None:
    world = paced(0.001)
    prompts = [sum(num for num in step.values() if num > 1) for step in world.steps[60:]]
    assert {num for num in prompts if num} <= set(range(2, LEAST_CHUNK + 1))
    world.run_until_idle(20_000)


def test_a_prompt_that_keeps_nobody_waiting_is_computed_at_once() -> None:
    world = paced(0.030)
    world.run_until_idle(5000)
    number = world.ask(900, 1)
    world.step()
    assert number in world.ended


# A CPU: a step of few rows takes as long as reading the weights, a prompt what it computes. The
# longest context here is read in a fifth of that time, and each token of a prompt attends to it.
CPU = LinearCost(0.010, 1.2e-3, 1e-6, attended_s=8e-7)
# A GPU: computing costs little beside reading.
GPU = LinearCost(0.005, 5e-5, 5e-8, attended_s=5e-9)
# What a step holds, and a prompt that is many times as long.
STEP, LONG = 256, 2000


def streaming(num_streams: int, cost: LinearCost = CPU, **limits: Any) -> BudgetWorld:
    """Return a world whose streams decode, and which knows from a prompt of before what steps cost."""
    world = BudgetWorld(cost, max_step_tokens=STEP, max_rows=48, num_blocks=5000, **limits)
    world.ask(LONG, 1)
    world.run_until_idle()
    for _ in range(num_streams):
        world.ask(15, 2000)
    world.step(40)
    return world


def beside_streams(cost: LinearCost, num_streams: int, num_prompts: int) -> tuple[float, float]:
    """Return by how much long prompts make a step of streams longer at most, and what they take.

    Both as multiples: of that very step without them, of one of them alone.
    """
    world = streaming(num_streams, cost)
    steps_alone = -(-LONG // STEP)
    alone_s = sum(world.seconds[:steps_alone])
    start = len(world.seconds)
    waiting = {world.ask(LONG, 1) for _ in range(num_prompts)}
    while not waiting <= world.ended.keys():
        world.step()
    assert len(world.ended) == 1 + num_prompts
    longer = (
        seconds / _without(world, at, waiting)
        for at, seconds in enumerate(world.seconds[start:], start)
    )
    return max(longer), sum(world.seconds[start:]) / alone_s


def _without(world: BudgetWorld, at: int, prompts: set[int]) -> float:
    """Return what a step would have taken without some requests; the others decode."""
    reads = [num for row, num in world.reads[at].items() if row not in prompts]
    return world.cost.seconds(StepWork(len(reads), sum(reads), 0, 0, sum(reads)))


@pytest.mark.parametrize(("cost", "num_streams"), [(CPU, 1), (CPU, 8), (CPU, 32), (GPU, 8)])
def test_a_long_prompt_among_streams_disturbs_them_little_and_is_soon_done(
    cost: LinearCost, num_streams: int
) -> None:
    step, first_token = beside_streams(cost, num_streams, 1)
    # Of each step by itself: the slowest steps of a machine are further apart than these.
    assert step <= 1 + LONG_PART + 0.05
    assert first_token <= 2.5


def test_many_long_prompts_are_not_kept_waiting_for_a_few_streams() -> None:
    _, all_first_tokens = beside_streams(CPU, 2, 8)
    assert all_first_tokens <= 8 * 1.5


def test_a_prompt_moves_on_whose_reading_alone_takes_longer_than_a_step() -> None:
    reading = LinearCost(0.001, 1e-4, 2e-6, attended_s=1e-9)
    step, first_token = beside_streams(reading, 8, 1)
    assert step > 2.0
    assert first_token <= 10


def test_a_short_prompt_is_computed_at_once_beside_streams() -> None:
    world = streaming(8)
    number = world.ask(200, 1)
    world.step()
    assert number in world.ended


def test_a_target_says_how_long_steps_are_instead() -> None:
    world = streaming(8, target_itl_s=0.2)
    start = len(world.seconds)
    world.ask(LONG, 1)
    world.step(4)
    assert max(world.seconds[start:]) > 0.15


def test_an_adapters_price_is_part_of_the_chunk() -> None:
    """The same prompts with an adapter, whose tokens cost twice as much, come in smaller chunks."""
    sizes = []
    for adapter in (0, 1):
        cost = LinearCost(0.010, 1e-4, token_rank_s=1e-4 / 16)
        world = BudgetWorld(cost, max_step_tokens=1024, num_blocks=20_000, target_itl_s=0.030)
        world.adapters.add(AdapterHandle(1), 1000, rank=16)
        world.ask(20, 400)
        for number in range(120):
            if number % 12 == 0:
                world.submit(ANYBODY, 800, 2, adapter)
            world.step()
        sizes.append(max(max(step.values()) for step in world.steps[-40:]))
    assert 0.4 < sizes[1] / sizes[0] < 0.65


# --- LoRAX's rule ---------------------------------------------------------------------------


def lorax_world(**rule: Any) -> BudgetWorld:
    """A world under LoRAX's policy; its adapters are those of the world."""
    world = BudgetWorld(max_rows=16)
    policy = OldestHead(world.adapters, **rule)
    return BudgetWorld(policy=policy, adapters=world.adapters, max_rows=16)


def test_lorax_lets_too_few_wait_until_those_that_run_had_their_tokens() -> None:
    world = lorax_world(waiting_served_ratio=1.2, max_waiting_tokens=10)
    for _ in range(5):
        world.ask(4, 100)
    world.step()
    later = world.ask(4, 4)
    world.step(30)
    # The step of the prompts counts, as there.
    assert world.admitted[later] == 10


def test_lorax_lets_as_many_in_as_the_ratio_asks_for() -> None:
    world = lorax_world(waiting_served_ratio=1.2, max_waiting_tokens=1000)
    for _ in range(5):
        world.ask(4, 100)
    world.step()
    later = [world.ask(4, 4) for _ in range(5)]
    world.step(30)
    assert not world.admitted.keys() & set(later)
    later.append(world.ask(4, 4))
    world.step(1)
    assert world.admitted.keys() >= set(later)


def test_lorax_counts_who_runs_when_rows_end_and_give_way() -> None:
    world = lorax_world(waiting_served_ratio=1.0, max_waiting_tokens=10**9)
    for output in (3, 3, 50):
        world.ask(4, output)
    world.step()
    later = world.ask(4, 4)
    world.step(1)
    assert later not in world.admitted
    world.step(3)
    # Two of three ended: one waits for one.
    assert later in world.admitted
