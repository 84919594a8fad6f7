"""Drafts: what is looked up, how many tokens of it, and which rows have any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.toy_paged_model import make_engine, make_plan, new_row, tokens_of

from lorax_contract.step import LogitBias, WarmupSpec
from lorax_shard.engine.drafter import Drafter, DraftSettings
from lorax_shard.engine.drafts import DraftPace, look_up
from lorax_shard.engine.inputs import RowWork


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("known", "count", "draft"),
    [
        ([1, 2, 3, 4, 9, 1, 2], 2, [3, 4]),
        # The latest of several places.
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),
        # One that is alike for longer goes before a later one.
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1, [3]),
        # What repeats itself goes on beyond the end.
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
        ([5, 5, 5], 4, [5, 5, 5, 5]),
        ([1, 2, 3], 4, []),
        ([1, 2], 4, []),
        ([1], 4, []),
        ([1, 2, 3, 1, 2], 0, []),
        ([1, 2, 3, 1, 2], -3, []),
    ],
)
def test_what_stands_behind_the_place_most_like_the_end(known, count, draft) -> None:
    assert look_up(ids(*known), count).tolist() == draft


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 9))
def test_a_draft_follows_a_place_that_is_like_the_end(known, count) -> None:
    draft = look_up(ids(*known), count).tolist()
    places = [place for place in range(2, len(known)) if known[place - 2 : place] == known[-2:]]
    assert len(draft) == (count if places and count else 0)
    if draft:
        nexts = [[*known[place:], *draft][: len(draft)] for place in places]
        assert draft in nexts


def test_drafts_are_long_while_some_is_kept_and_pause_while_nothing_is() -> None:
    pace = DraftPace(8)
    assert pace.length() == 8
    pace.checked(8, 3)
    assert pace.length() == 8
    pauses = []
    for _ in range(9):
        pace.checked(8, 0)
        num = 0
        while not pace.length():
            num += 1
        pauses.append(num)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert pace.length() == 4
    pace.checked(4, 1)
    assert pace.length() == 8
    pace.checked(8, 0)
    assert [pace.length(), pace.length()] == [0, 4]


def always(known, count):
    return np.full(max(count, 0), 3, dtype=np.int64)


def drafter(*, max_tokens: int = 5, max_rows: int = 4, max_depth: int = 2) -> Drafter:
    made = Drafter(DraftSettings(max_tokens, max_rows, max_depth), always)
    made.limit(WarmupSpec(max_input_length=32, max_total_tokens=48, max_step_tokens=16, max_rows=8))
    return made


def resident(count: int, *, num_prompt: int = 6, num_blocks: int = 4, max_new_tokens: int = 20):
    """Return rows that have one token left to compute."""
    engine = make_engine(drafter=drafter())
    rows = []
    for number in range(1, count + 1):
        row = engine.admit(new_row(number, [9] * num_prompt, max_new_tokens=max_new_tokens))
        row.num_computed = num_prompt - 1
        engine.batch.grant(row, list(range(4 * number, 4 * number + num_blocks)))
        rows.append(row)
    return rows


def lengths(made: Drafter, work: list[RowWork]) -> list[int]:
    return [len(item.draft) for item in made.added_to(work, 4)]


def test_a_row_has_as_many_as_it_may() -> None:
    assert lengths(drafter(), [RowWork(row, 1) for row in resident(1)]) == [5]


def test_a_place_is_left_for_each_step_that_is_planned_already() -> None:
    """Of two blocks of four tokens six are known: one is drafted, one is the next step's."""
    (row,) = resident(1, num_blocks=2)
    assert lengths(drafter(max_depth=2), [RowWork(row, 1)]) == [1]
    (row,) = resident(1, num_blocks=2)
    assert lengths(drafter(max_depth=3), [RowWork(row, 1)]) == [0]


def test_nothing_is_drafted_beyond_the_end_of_an_output() -> None:
    """Of three tokens the first is drawn in any case, and the last is not computed."""
    (row,) = resident(1, max_new_tokens=3)
    assert lengths(drafter(), [RowWork(row, 1)]) == [2]


def test_steps_with_many_rows_draft_nothing() -> None:
    rows = resident(3)
    assert lengths(drafter(max_rows=2), [RowWork(row, 1) for row in rows]) == [0, 0, 0]


def test_a_step_holds_no_more_than_the_largest_one() -> None:
    """Eight logits of eight rows: three rows and five tokens of drafts."""
    rows = resident(3)
    work = drafter().added_to([RowWork(row, 1) for row in rows], 4)
    assert sum(item.num_computed for item in work) == 8
    assert [item.num_computed > 1 for item in work] == [False, False, True]


def test_prompts_and_rows_bound_to_grammars_draft_nothing() -> None:
    (row,) = resident(1)
    row.num_computed = 2
    assert lengths(drafter(), [RowWork(row, 1)]) == [0]
    assert lengths(drafter(), [RowWork(row, 4)]) == [0]
    row.num_computed, row.pace = 5, None
    assert lengths(drafter(), [RowWork(row, 1)]) == [0]


def test_an_outcome_has_all_tokens_that_are_kept() -> None:
    """Text that repeats itself: the model is made to, by a bias."""
    engine = make_engine(drafter=Drafter(DraftSettings(5, 4, 1)))
    row = new_row(1, [9, 9, 9, 9], max_new_tokens=20, logit_bias=LogitBias((9,), (100.0,)))
    first = engine.step(make_plan(1, [(1, 4, [0, 1, 2, 3])], new=[row]))
    assert (tokens_of(first, 1)[0], first.num_drafted) == ([9], 0)
    second = engine.step(make_plan(2, [(1, 1, [])]))
    # There is memory for the logits of four rows.
    assert tokens_of(second, 1)[0] == [9] * 4
    assert second.num_tokens == [4]
    assert second.num_drafted == 3
    (kept,) = engine.batch
    assert (kept.num_tokens, kept.num_computed) == (9, 8)
