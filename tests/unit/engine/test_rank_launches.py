"""Ranks launch steps without waiting for each other; what they have to agree on is asked later."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from tests.helpers.thread_ranks import Meeting, ThreadGroup
from tests.helpers.toy_paged_model import (
    NAN_ID,
    expected_tokens,
    make_engine,
    make_plan,
    new_row,
    tokens_of,
)

from lorax_contract.step import FinishCode, StepPlan
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.rows import Row
from lorax_shard.engine.same_rows import RowComparison
from lorax_shard.parallel.group import GroupBrokenError
from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.sampler import Sampler, SamplesRows

PROMPTS = {1: [7, 9, 11], 2: [40, 41, 42, 43]}


def make_ranks(num: int, method: SamplesRows | None = None) -> list[Engine]:
    """Return warm engines of one group, driven by one thread: whoever waited would wait for ever."""
    meeting = Meeting(num)
    engines = [make_rank(ThreadGroup(meeting, rank)) for rank in range(num)]
    engines[0].computation.sampler = Sampler(engines[0].model.vocab_size, method=method)
    return engines


def make_rank(group: ThreadGroup) -> Engine:
    engine = make_engine()
    engine._group = engine.computation._group = group
    if group.rank:
        engine.computation.sampler = engine._collector = None
    return engine


def plans(num_steps: int) -> list[StepPlan]:
    rows = [new_row(number, prompt) for number, prompt in PROMPTS.items()]
    first = make_plan(1, [(1, 3, [0, 1]), (2, 4, [2, 3, 4])], new=rows)
    others = [make_plan(seq, [(1, 1, []), (2, 1, [])]) for seq in range(2, num_steps + 1)]
    return [first, *others]


@pytest.mark.parametrize("method", [None, draw_batch], ids=["ids read", "ids on the device"])
def test_a_rank_that_draws_launches_ahead_of_those_that_have_not_begun(
    method: SamplesRows | None,
) -> None:
    ranks = make_ranks(3, method)
    launched = [[engine.launch(plan) for plan in plans(4)] for engine in ranks]
    outcomes = [
        [engine.collect(step) for step in steps]
        for engine, steps in zip(ranks, launched, strict=True)
    ]
    for number, prompt in PROMPTS.items():
        found = [token for step in outcomes[0] for token in tokens_of(step, number)[0]]
        assert found == expected_tokens(prompt, 4)
    # And all of them have computed the same.
    for engine in ranks:
        engine.computation.read()
    ids = [[row.token_ids[:-1].tolist() for row in engine.batch] for engine in ranks]
    assert ids[0] == ids[1] == ids[2]


def test_a_row_without_a_token_ends_on_all_ranks_when_its_id_is_read() -> None:
    ranks = make_ranks(2)
    rows = [new_row(1, PROMPTS[1]), new_row(2, [4, NAN_ID])]
    sent = [
        make_plan(1, [(1, 3, [0, 1]), (2, 2, [2, 3])], new=rows),
        make_plan(2, [(1, 1, []), (2, 1, [])]),
        make_plan(3, [(1, 1, []), (2, 1, [])]),
    ]
    launched = [[engine.launch(plan) for plan in sent] for engine in ranks]
    assert [[row.request_id for row in engine.batch] for engine in ranks] == [[1], [1]]
    outcomes = [ranks[0].collect(step) for step in launched[0]]
    assert tokens_of(outcomes[0], 2) == ([], FinishCode.ERROR)
    assert [outcome.row_ids for outcome in outcomes[1:]] == [[1], [1]]
    found = [token for step in outcomes for token in tokens_of(step, 1)[0]]
    assert found == expected_tokens(PROMPTS[1], 3)


def test_rows_that_ended_and_were_dropped_are_forgotten() -> None:
    """On rank 0, which says that they end, too."""
    ranks = make_ranks(2)
    for number in range(1, 30):
        row = new_row(number, PROMPTS[1], max_new_tokens=1)
        plan = make_plan(number, [(number, 3, [0, 1])], new=[row], drop=[number - 1])
        for engine, step in [(engine, engine.launch(plan)) for engine in ranks]:
            engine.collect(step)
        del engine, step
    assert sum(isinstance(each, Row) for each in gc.get_objects()) < 10


def test_different_rows_are_told_of_before_any_token_is() -> None:
    ranks = make_ranks(2)
    rows = [new_row(number, prompt) for number, prompt in PROMPTS.items()]
    one = ranks[0].launch(make_plan(1, [(1, 3, [0, 1])], new=rows[:1]))
    other = ranks[1].launch(make_plan(1, [(2, 3, [0, 1])], new=rows[1:]))
    for engine, step in zip(ranks, (one, other), strict=True):
        with pytest.raises(GroupBrokenError, match=r"ranks \[1\] hold other rows than rank 0"):
            engine.collect(step)


def test_different_rows_are_named_where_the_pass_cannot_end(monkeypatch: Any) -> None:
    ranks = make_ranks(2)
    rows = [new_row(number, prompt) for number, prompt in PROMPTS.items()]
    RowComparison(ranks[1]._group, 1, [])

    def broken(*_given: Any, **_named: Any) -> None:
        raise GroupBrokenError("the ranks wait in vain")

    monkeypatch.setattr(ranks[0].model, "forward", broken)
    with pytest.raises(GroupBrokenError, match="hold other rows"):
        ranks[0].launch(make_plan(1, [(1, 3, [0, 1])], new=rows[:1]))
