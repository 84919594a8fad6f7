"""Table tests of the scheduler: one situation each, through its public calls only."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from lorax_contract.errors import ValidationError
from lorax_contract.step import (
    AdapterHandle,
    FinishCode,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
    TokenColumns,
)
from lorax_router.core.adapters.table import AdapterEvent, AdapterTable
from lorax_router.core.policies.ranked import MAX_BYPASSES
from lorax_router.core.request import RequestState
from lorax_router.core.scheduler import ProtocolError, Scheduler


def make_scheduler(**overrides: Any) -> Scheduler:
    """Return a small scheduler: 8 blocks of 4 tokens, 16 tokens a step, 4 rows, lockstep.

    It keeps no prefixes: these prompts all begin alike.
    """
    values: dict[str, Any] = {
        "num_blocks": 8, "block_size": 4, "max_step_tokens": 16, "max_rows": 4, "depth": 1,
        "prefix_caching": False,
    }  # fmt: skip
    return Scheduler(**(values | overrides))


def submit(
    scheduler: Scheduler, request_id: int, num_prompt: int, max_new: int = 4, adapter: int = 0
) -> None:
    """Queue a request of ``num_prompt`` tokens; with ``max_new`` 0 it asks for no more."""
    spec = RequestSpec(
        request_id=RequestId(request_id),
        prompt_ids=list(range(num_prompt)),
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=max_new),
        adapter=AdapterHandle(adapter),
        output=OutputKind.TOKENS if max_new else OutputKind.PROMPT,
    )
    scheduler.submit(spec, 0.0)


def answer(
    plan: StepPlan, tokens: dict[int, int], finish: dict[int, FinishCode] | None = None
) -> StepOutcome:
    """Return the outcome in which the named requests gained one token each."""
    finish = finish or {}
    ids = sorted(tokens.keys() | finish.keys())
    gained = [row for row in ids if row in tokens]
    count = len(gained)
    return StepOutcome(
        seq=plan.seq,
        row_ids=[RequestId(row) for row in ids],
        num_tokens=[int(row in tokens) for row in ids],
        finish=[finish.get(row, FinishCode.RUNNING) for row in ids],
        tokens=TokenColumns(
            [tokens[row] for row in gained], [0.0] * count, [""] * count, [False] * count
        ),
    )


def step(scheduler: Scheduler, tokens: dict[int, int], **kwargs: Any) -> StepPlan:
    """Plan, check, and apply an outcome with these tokens."""
    plan = scheduler.plan(0.0)
    assert plan is not None
    scheduler.check()
    scheduler.apply(answer(plan, tokens, **kwargs), 0.0)
    scheduler.check()
    return plan


def test_nothing_to_do_plans_nothing() -> None:
    """An empty scheduler is idle."""
    scheduler = make_scheduler()
    assert scheduler.plan(0.0) is None
    assert scheduler.is_idle


def test_a_prompt_then_decodes_then_the_drop() -> None:
    """The life of one request: prompt with its blocks, decodes, end, row dropped."""
    scheduler = make_scheduler()
    submit(scheduler, 1, 5, max_new=3)
    first = step(scheduler, {1: 9})
    assert (first.row_ids, first.num_tokens, first.num_new_blocks) == ([1], [5], [2])
    assert [row.spec.request_id for row in first.new_rows] == [1]
    second = step(scheduler, {1: 9})
    assert (second.num_tokens, second.num_new_blocks, second.new_rows) == ([1], [0], [])
    step(scheduler, {1: 9}, finish={1: FinishCode.LENGTH})
    last = scheduler.plan(0.0)
    assert last is not None
    assert (last.drop, last.row_ids) == ([1], [])
    assert scheduler.stats().num_free_blocks == 8


def test_decodes_come_first_and_prompts_share_the_rest_in_chunks() -> None:
    """A long prompt never stops a running row from decoding."""
    scheduler = make_scheduler(num_blocks=32, max_step_tokens=8)
    submit(scheduler, 1, 2, max_new=8)
    step(scheduler, {1: 9})
    submit(scheduler, 2, 20)
    plans = [step(scheduler, {1: 9}) for _ in range(2)] + [step(scheduler, {1: 9, 2: 9})]
    assert [plan.num_tokens for plan in plans] == [[1, 7], [1, 7], [1, 6]]


def test_w6_a_request_that_can_never_fit_is_refused_and_one_that_just_fits_runs() -> None:
    """All blocks are usable; one token more than they hold is refused at submission."""
    scheduler = make_scheduler(max_step_tokens=64)
    with pytest.raises(ValidationError, match="more than the 32 tokens"):
        submit(scheduler, 1, 30, max_new=4)
    submit(scheduler, 2, 30, max_new=3)  # 32 tokens of KV: the last token needs none
    for _ in range(2):
        step(scheduler, {2: 9})
    step(scheduler, {2: 9}, finish={2: FinishCode.LENGTH})
    assert scheduler.stats().num_free_blocks == 8


def test_w7_a_small_request_passes_one_that_does_not_fit() -> None:
    """The head of the queue waits for blocks; a later, smaller one runs meanwhile."""
    scheduler = make_scheduler(max_step_tokens=32)
    submit(scheduler, 1, 16, max_new=8)
    step(scheduler, {1: 9})
    submit(scheduler, 2, 20)
    submit(scheduler, 3, 2)
    plan = step(scheduler, {1: 9, 3: 9})
    assert [row.spec.request_id for row in plan.new_rows] == [3]


def test_bypassing_is_bounded() -> None:
    """A request that does not fit lets MAX_BYPASSES others pass, then all wait for it."""
    scheduler = make_scheduler(num_blocks=4, block_size=64, max_step_tokens=200)
    submit(scheduler, 1, 1, max_new=100)
    step(scheduler, {1: 9})
    submit(scheduler, 2, 190, max_new=2)
    for request_id in range(3, MAX_BYPASSES + 20):
        submit(scheduler, request_id, 1, max_new=1)
    passed = 0
    for _ in range(MAX_BYPASSES + 20):
        plan = scheduler.plan(0.0)
        assert plan is not None
        small = [row for row in plan.row_ids if row > 2]
        passed += len(small)
        ends = dict.fromkeys(small, FinishCode.LENGTH)
        scheduler.apply(answer(plan, dict.fromkeys(plan.row_ids, 9), ends), 0.0)
        scheduler.check()
    assert passed == MAX_BYPASSES
    scheduler.cancel(RequestId(1))
    assert 2 in step(scheduler, {2: 9, 67: 9, 68: 9, 69: 9}).row_ids


def test_w8_blocks_are_granted_as_tokens_arrive() -> None:
    """max_new_tokens reserves nothing: two requests whose limits exceed the pool run together."""
    scheduler = make_scheduler()
    submit(scheduler, 1, 4, max_new=28)
    submit(scheduler, 2, 4, max_new=28)
    plan = step(scheduler, {1: 9, 2: 9})
    assert plan.num_new_blocks == [1, 1]


def test_the_youngest_gives_way_and_is_computed_again_with_its_output() -> None:
    """Preemption: the row is dropped, and comes back with what it had generated."""
    scheduler = make_scheduler(num_blocks=4)
    submit(scheduler, 1, 4, max_new=8)
    submit(scheduler, 2, 4, max_new=8)
    for _ in range(5):
        step(scheduler, {1: 9, 2: 8})
    plan = step(scheduler, {1: 9})
    assert (plan.drop, plan.row_ids) == ([2], [1])
    assert scheduler.stats().num_preemptions == 1
    step(scheduler, {1: 9})
    step(scheduler, {1: 9}, finish={1: FinishCode.LENGTH})
    back = step(scheduler, {2: 8})
    assert back.drop == [1]
    assert [list(row.output_ids) for row in back.new_rows] == [[8] * 5]
    assert back.num_tokens == [9]


def test_depth_two_plans_ahead_and_frees_late() -> None:
    """A row that ended in step n is in step n+1 already; its blocks return after n+1."""
    scheduler = make_scheduler(depth=2)
    submit(scheduler, 1, 4, max_new=8)
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert first is not None and second is not None
    assert (first.num_tokens, second.num_tokens) == ([4], [1])
    assert scheduler.plan(0.0) is None
    assert scheduler.apply(answer(first, {1: 9}, {1: FinishCode.EOS_TOKEN}), 0.0) == [True]
    assert scheduler.stats().num_free_blocks == 8
    scheduler.check()
    # All blocks are spoken for by one who needs eight: the second step still touches two.
    submit(scheduler, 2, 32, max_new=1)
    third = scheduler.plan(0.0)
    assert third is None or third.new_rows == []
    assert scheduler.apply(answer(second, {}), 0.0) == []
    scheduler.check()
    fourth = scheduler.plan(0.0)
    assert fourth is not None
    assert [row.spec.request_id for row in fourth.new_rows] == [2]


def test_depth_two_never_runs_past_the_output_limit() -> None:
    """The last token is on its way: no step is planned for the row after it."""
    scheduler = make_scheduler(depth=2)
    submit(scheduler, 1, 4, max_new=1)
    assert scheduler.plan(0.0) is not None
    assert scheduler.plan(0.0) is None


def test_cancelled_requests_leave_at_once_and_their_tokens_do_not_count() -> None:
    """A client that left frees its blocks with the step in flight."""
    scheduler = make_scheduler()
    submit(scheduler, 1, 4)
    submit(scheduler, 2, 4)
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert scheduler.cancel(RequestId(1))
    assert not scheduler.cancel(RequestId(1))
    assert scheduler.apply(answer(plan, {1: 9, 2: 9}), 0.0) == [False, True]
    following = scheduler.plan(0.0)
    assert following is not None
    assert (following.drop, following.row_ids) == ([1], [2])
    scheduler.check()


def test_w19_requests_that_wait_hold_no_blocks() -> None:
    """Whatever does not run owns nothing: queued, passed over, preempted."""
    scheduler = make_scheduler(num_blocks=4)
    submit(scheduler, 1, 4, max_new=8)
    submit(scheduler, 2, 4, max_new=8)
    submit(scheduler, 3, 12, max_new=2)
    for _ in range(5):
        step(scheduler, {1: 9, 2: 8})
    step(scheduler, {1: 9})
    assert (scheduler.stats().num_running, scheduler.stats().num_waiting) == (1, 2)
    scheduler.cancel(RequestId(1))
    assert scheduler.stats().num_free_blocks == 4


def test_w28_nothing_is_kept_of_requests_that_ended() -> None:
    """After thousands of requests the scheduler holds what it held at the start."""
    # What other tests of this process left is not this one's.
    before = _requests()
    scheduler = make_scheduler()
    for request_id in range(1, 3001):
        submit(scheduler, request_id, 3, max_new=1)
        plan = scheduler.plan(0.0)
        assert plan is not None
        ends = {request_id: FinishCode.LENGTH}
        scheduler.apply(answer(plan, {request_id: 9}, ends), 0.0)
    last = scheduler.plan(0.0)
    assert last is not None
    scheduler.apply(StepOutcome(seq=last.seq), 0.0)
    assert scheduler.is_idle
    del plan, last
    known = {id(each) for each in before}
    assert [each for each in _requests() if id(each) not in known] == []


def _requests() -> list[object]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (RequestSpec, RequestState)]


def test_w34_a_cancelled_waiting_request_leaves_the_queue() -> None:
    """It is gone from the queue, and the shards never hear of it."""
    scheduler = make_scheduler(max_rows=1)
    submit(scheduler, 1, 4)
    step(scheduler, {1: 9})
    submit(scheduler, 2, 4)
    assert scheduler.stats().num_waiting == 1
    assert scheduler.cancel(RequestId(2))
    assert scheduler.stats().num_waiting == 0
    assert step(scheduler, {1: 9}).drop == []


def test_w5_a_row_that_fails_ends_alone() -> None:
    """An error ends its own request; the others of the step go on."""
    scheduler = make_scheduler()
    submit(scheduler, 1, 4)
    submit(scheduler, 2, 4)
    step(scheduler, {2: 9}, finish={1: FinishCode.ERROR})
    assert step(scheduler, {2: 9}).row_ids == [2]


def test_outcomes_out_of_order_or_short_are_refused() -> None:
    """The scheduler never guesses: a missing token or a wrong step is a protocol error."""
    scheduler = make_scheduler()
    submit(scheduler, 1, 4)
    plan = scheduler.plan(0.0)
    assert plan is not None
    with pytest.raises(ProtocolError, match="step 7 came"):
        scheduler.apply(StepOutcome(seq=7), 0.0)
    with pytest.raises(ProtocolError, match="neither a token nor an end for requests"):
        scheduler.apply(answer(plan, {}), 0.0)


def test_losing_the_shards_is_preempting_everything() -> None:
    """Output so far is kept, steps count anew, and the next plan brings all rows back."""
    scheduler = make_scheduler(depth=2)
    submit(scheduler, 1, 4)
    submit(scheduler, 2, 3)
    step(scheduler, {1: 9, 2: 8})
    scheduler.plan(0.0)
    lost = scheduler.shards_lost(0.0, epoch=2, num_blocks=8, adapter_bytes=None)
    assert not lost.ended
    scheduler.check()
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.seq == 1
    assert [(row.spec.request_id, list(row.output_ids)) for row in plan.new_rows] == [
        (1, [9]),
        (2, [8]),
    ]


def test_requests_that_shards_with_less_memory_can_never_hold_end_in_words() -> None:
    """The pool and the room for adapters are the new ones'; what fits neither ends."""
    table = AdapterTable(max_resident=4, max_bytes=9)
    for number, nbytes in ((1, 4), (2, 3), (3, 1), (4, 2)):
        table.add(AdapterHandle(number), nbytes)
    scheduler = make_scheduler(adapters=table)
    for number in (3, 4):
        table.pin(AdapterHandle(number))
    submit(scheduler, 1, 4)
    submit(scheduler, 2, 20)
    for request_id, adapter in ((3, 1), (4, 2), (5, 3), (6, 4)):
        submit(scheduler, request_id, 4, adapter=adapter)
    before = scheduler.adapter_orders()
    scheduler.plan(0.0)
    lost = scheduler.shards_lost(1.0, epoch=5, num_blocks=4, adapter_bytes=2)
    scheduler.check()
    assert lost.impossible.keys() == {2, 3, 4, 6}
    assert "more than the 16 tokens" in lost.impossible[RequestId(2)]
    assert "takes 4 bytes" in lost.impossible[RequestId(3)]
    # Of the pins the first one fits, and keeps its place; no other may take that.
    assert "pinned adapters leave 1 of 2" in lost.impossible[RequestId(6)]
    assert [record.handle for record in table.snapshot() if record.is_pinned] == [3]
    assert scheduler.stats().num_waiting == 2
    assert before.epoch == 1
    scheduler.plan(2.0)
    assert scheduler.adapter_orders().epoch == 5


def test_what_comes_of_an_order_for_shards_that_are_gone_is_void() -> None:
    """Its adapter is being prepared anew, by another order."""
    table = AdapterTable(max_resident=1)
    table.add(AdapterHandle(1), 1)
    scheduler = make_scheduler(adapters=table)
    submit(scheduler, 1, 4, adapter=1)
    scheduler.plan(0.0)
    old = scheduler.adapter_orders()
    scheduler.shards_lost(1.0, epoch=2, num_blocks=8, adapter_bytes=None)
    for event in (AdapterEvent.PREPARED, AdapterEvent.FAILED, AdapterEvent.RELEASED):
        assert scheduler.adapter_event(AdapterHandle(1), event, 1.0, epoch=old.epoch) == []
        scheduler.check()
    scheduler.plan(2.0)
    new = scheduler.adapter_orders()
    assert (old.prepare, new.prepare) == ([1], [1])
    scheduler.adapter_event(AdapterHandle(1), AdapterEvent.PREPARED, 2.0, epoch=new.epoch)
    assert step(scheduler, {1: 9}).activate == [1]


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_rows", "depth"])
def test_sizes_below_one_are_refused(name: str) -> None:
    """Constructor values are checked."""
    with pytest.raises(ValueError, match="at least 1"):
        make_scheduler(**{name: 0})


def test_a_step_must_have_room_for_every_row() -> None:
    """Otherwise the last rows would never decode."""
    with pytest.raises(ValueError, match="max_step_tokens"):
        make_scheduler(max_step_tokens=3)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_without_tokens_is_computed_in_chunks_and_ends_with_its_prompt(
    depth: int,
) -> None:
    """It is awaited like a token, planned no further, and leaves nothing behind."""
    scheduler = make_scheduler(depth=depth)
    submit(scheduler, 1, 20, max_new=0)
    first = scheduler.plan(0.0)
    assert first is not None and first.num_tokens == [16]
    scheduler.apply(answer(first, {}), 0.0)
    last = scheduler.plan(0.0)
    assert last is not None and last.num_tokens == [4]
    assert scheduler.plan(0.0) is None
    scheduler.check()
    with pytest.raises(ProtocolError, match="neither a token nor an end"):
        make_and_miss_the_end()
    assert scheduler.apply(answer(last, {}, {1: FinishCode.LENGTH}), 0.0) == [True]
    assert step(scheduler, {}).drop == [1]
    assert scheduler.is_idle
    assert scheduler.stats().num_free_blocks == 8


def make_and_miss_the_end() -> None:
    scheduler = make_scheduler()
    submit(scheduler, 1, 4, max_new=0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    scheduler.apply(answer(plan, {}), 0.0)


def test_a_request_without_tokens_may_fill_the_pool() -> None:
    scheduler = make_scheduler()
    submit(scheduler, 1, 32, max_new=0)
    submit(scheduler, 2, 32, max_new=1)
    for max_new in (0, 1):
        with pytest.raises(ValidationError, match="more than the 32 tokens"):
            submit(scheduler, 3, 33, max_new=max_new)


def test_an_end_that_was_on_its_way_when_the_shards_were_lost_is_awaited_anew() -> None:
    """Its prompt is computed again, like everything of a step that nobody acknowledged."""
    scheduler = make_scheduler(num_blocks=4, depth=2)
    submit(scheduler, 1, 4, max_new=12)
    step(scheduler, {1: 9})
    submit(scheduler, 2, 4, max_new=0)
    while scheduler.num_in_flight < 2:
        assert scheduler.plan(0.0) is not None
    lost = scheduler.shards_lost(0.0, epoch=2, num_blocks=4, adapter_bytes=None)
    assert not lost.ended
    scheduler.check()
    again = scheduler.plan(0.0)
    assert again is not None and [row.spec.request_id for row in again.new_rows] == [1, 2]


@pytest.mark.parametrize(("output", "max_new"), [(OutputKind.TOKENS, 0), (OutputKind.PROMPT, 1)])
def test_a_limit_that_does_not_go_with_what_is_asked_is_refused(
    output: OutputKind, max_new: int
) -> None:
    spec = RequestSpec(
        request_id=RequestId(1),
        prompt_ids=[1],
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=max_new),
        output=output,
    )
    with pytest.raises(ValidationError, match="`max_new_tokens` must be"):
        make_scheduler().submit(spec, 0.0)
