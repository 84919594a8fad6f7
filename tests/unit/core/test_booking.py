"""Tokens beyond what was planned: booked with their step, never beyond the blocks."""

from __future__ import annotations

import pytest

from lorax_contract.step import (
    FinishCode,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StoppingParams,
    TokenColumns,
)
from lorax_router.core.cost import StepWork
from lorax_router.core.scheduler import ProtocolError, Scheduler

ONE = RequestId(1)


def scheduler_with(
    depth: int = 1, draft_tokens: int = 3, num_blocks: int = 20, max_new_tokens: int = 12
) -> Scheduler:
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=4, max_step_tokens=16, max_rows=4, depth=depth,
        draft_tokens=draft_tokens,
    )  # fmt: skip
    spec = RequestSpec(
        request_id=ONE, prompt_ids=[5, 6, 7], sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=max_new_tokens),
    )  # fmt: skip
    scheduler.submit(spec, 0.0)
    return scheduler


def outcome(seq: int, num: int, finish: FinishCode = FinishCode.RUNNING, drafted: int = 0):
    tokens = TokenColumns([8] * num, [0.0] * num, ["x"] * num, [False] * num)
    return StepOutcome(seq, [ONE], [num], [finish], tokens, num_drafted=drafted)


def test_a_row_goes_on_behind_what_was_kept() -> None:
    scheduler = scheduler_with()
    scheduler.plan(0.0)
    scheduler.apply(outcome(1, 1), 1.0)
    plan = scheduler.plan(1.0)
    assert plan is not None
    # Its first block holds the prompt and one token: a second is there for three more.
    assert plan.num_tokens == [1]
    assert plan.num_new_blocks == [1]
    scheduler.apply(outcome(2, 4, drafted=5), 2.0)
    scheduler.check()
    stats = scheduler.stats()
    assert (stats.num_drafted_tokens, stats.num_accepted_tokens) == (5, 3)
    plan = scheduler.plan(2.0)
    assert plan is not None
    assert plan.num_tokens == [1]
    scheduler.apply(outcome(3, 4), 3.0)
    scheduler.plan(3.0)
    scheduler.apply(outcome(4, 3, FinishCode.LENGTH), 4.0)
    if scheduler.plan(4.0) is not None:
        scheduler.apply(StepOutcome(5), 5.0)
    assert scheduler.is_idle
    scheduler.check(is_idle=True)


def test_a_shard_that_computes_beyond_the_blocks_is_told_so() -> None:
    scheduler = scheduler_with(draft_tokens=0)
    scheduler.plan(0.0)
    scheduler.apply(outcome(1, 1), 1.0)
    scheduler.plan(1.0)
    with pytest.raises(ProtocolError, match="blocks"):
        scheduler.apply(outcome(2, 4), 2.0)


def test_blocks_are_granted_ahead_only_where_there_are_plenty() -> None:
    scheduler = scheduler_with(num_blocks=4)
    scheduler.plan(0.0)
    scheduler.apply(outcome(1, 1), 1.0)
    first = scheduler.plan(1.0)
    assert first is not None
    assert first.num_new_blocks == [1]
    scheduler.apply(outcome(2, 4), 2.0)
    second = scheduler.plan(2.0)
    assert second is not None
    # Two blocks are left, and one row runs.
    assert second.num_new_blocks == [0]


def test_what_steps_cost_is_learned_of_all_that_they_computed() -> None:
    """A step takes 10 ms and 1 for each token, those included that were drafted for nothing."""
    scheduler = scheduler_with(max_new_tokens=60)
    num_tokens = 3
    for seq in range(1, 60):
        assert scheduler.plan(float(seq)) is not None
        drafted = 0 if seq == 1 else seq * 5 % 8
        done = outcome(seq, 1, drafted=drafted)
        done.total_ns = (10 + num_tokens + drafted) * 1_000_000
        scheduler.apply(done, float(seq))
        num_tokens = 1
    cost = scheduler.stats().step_cost
    assert cost is not None
    for tokens in (1, 8):
        assert cost.seconds(StepWork(tokens, 0, 0, 0)) == pytest.approx(
            0.010 + 0.001 * tokens, rel=0.1
        )


def test_drafts_are_computed_with_the_adapters_of_their_rows() -> None:
    assert StepWork(4, 9, 7, 32).with_drafts(2) == StepWork(6, 9, 7, 48)
    assert StepWork(4, 9, 7, 32).with_drafts(0) == StepWork(4, 9, 7, 32)
