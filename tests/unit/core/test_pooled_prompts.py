"""Prompts of which a vector is wanted: they have a part of the time of who decodes, and move on."""

from __future__ import annotations

import pytest

from lorax_contract.step import (
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.blocks import BlockPool
from lorax_router.core.cost import LinearCost
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.prefix import BlockNames, PrefixIndex
from lorax_router.core.request import RequestState
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.step_builder import LEAST_CHUNK, POOLED_PART, StepBudget, StepBuilder

COST = LinearCost(0.040, 0.0002)


def request(number: int, num_prompt: int, output: OutputKind) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(number), prompt_ids=list(range(num_prompt)), sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=200 if output is OutputKind.TOKENS else 0),
        output=output,
    )  # fmt: skip


def seconds_of(plan: StepPlan) -> float:
    return COST.fixed_s + COST.token_s * sum(plan.num_tokens)


class World:
    """A scheduler over a shard whose steps take what COST says."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(
            num_blocks=4000, block_size=4, max_step_tokens=2000, max_rows=300, depth=1,
            policy=FirstComeFirstServed(), prefix_caching=False,
        )  # fmt: skip
        self.known: dict[RequestId, RequestSpec] = {}
        self.left: dict[RequestId, int] = {}
        self.now = 0.0

    def submit(self, spec: RequestSpec) -> None:
        self.scheduler.submit(spec, self.now)
        self.known[spec.request_id] = spec
        self.left[spec.request_id] = len(spec.prompt_ids)

    def step(self) -> StepPlan:
        plan = self.scheduler.plan(self.now)
        assert plan is not None
        self.now += seconds_of(plan)
        outcome = StepOutcome(seq=plan.seq, total_ns=int(1e9 * seconds_of(plan)))
        for row, num in zip(plan.row_ids, plan.num_tokens, strict=True):
            self.left[row] -= num
            if self.left[row] > 0:
                continue
            tokens = self.known[row].output is OutputKind.TOKENS
            self.left[row] = 1 if tokens else 0
            outcome.row_ids.append(row)
            outcome.num_tokens.append(int(tokens))
            outcome.finish.append(0 if tokens else 1)
            if tokens:
                outcome.tokens.ids.append(7)
                outcome.tokens.logprobs.append(0.0)
                outcome.tokens.texts.append("")
                outcome.tokens.special.append(False)
            else:
                del self.left[row]
        self.scheduler.apply(outcome, self.now)
        self.scheduler.check()
        return plan


def decoding() -> World:
    """Return a world in which some rows decode, and whose prices are known."""
    world = World()
    for number in range(4):
        world.submit(request(number, 5 + 30 * number, OutputKind.TOKENS))
        world.step()
    for _ in range(12):
        world.step()
    return world


@pytest.mark.parametrize("output", [OutputKind.VECTOR, OutputKind.SCORES])
@pytest.mark.parametrize("num_prompt", [7, 30, 700])
def test_who_decodes_waits_little_longer_and_every_vector_is_made(
    output: OutputKind, num_prompt: int
) -> None:
    world = decoding()
    alone = seconds_of(world.step())
    for number in range(40):
        world.submit(request(100 + number, num_prompt, output))
    most = alone * (1 + POOLED_PART) + COST.token_s * LEAST_CHUNK
    longest, num_steps = 0.0, 0
    while len(world.left) > 4 and num_steps < 170:
        plan = world.step()
        num_steps += 1
        assert len([row for row in plan.row_ids if row < 100]) == 4
        longest = max(longest, seconds_of(plan))
    assert longest <= most * 1.05
    # All the while some were computed: the part is used.
    assert longest > alone * (1 + POOLED_PART / 2)


def test_where_nobody_decodes_they_have_whole_steps() -> None:
    world = decoding()
    for row in [*world.left]:
        world.scheduler.cancel(row)
        del world.left[row]
    for number in range(20):
        world.submit(request(100 + number, 50, OutputKind.VECTOR))
    assert sum(world.step().num_tokens) == 1000


def test_the_first_of_a_step_moves_on_however_dear_it_is() -> None:
    budget = StepBudget(1000, cost=LinearCost(0.001, 1.0))
    pool = BlockPool(500, PrefixIndex(BlockNames(4), is_on=False, is_shared=False))
    builder = StepBuilder(1, budget, pool, 4, AdapterTable(max_resident=1), 0.0)
    builder.is_paced = True
    asked = RequestState(request(1, 300, OutputKind.VECTOR), 0, 0.0)
    assert builder.chunk(asked, 0) == LEAST_CHUNK
    # Others wait for the next one.
    assert builder.chunk(asked, 0) == 0
