"""Drafts: how likely each is kept, how many pay, and which rows have any."""

from __future__ import annotations

import numpy as np
import pytest
from tests.helpers.oracle import FREE
from tests.helpers.toy_paged_model import make_engine, make_plan, new_row, tokens_of

from lorax_contract.step import LogitBias
from lorax_shard.engine.drafter import Drafter, DraftSettings
from lorax_shard.engine.drafts import Draft, DraftPace, MatchCounts
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.pass_prices import PassPrices


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("known", "most", "draft"),
    [
        ([1, 2, 3, 4, 9, 1, 2], 2, [3, 4]),
        # What repeats itself goes on beyond the end.
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
        ([5, 5, 5], 4, [5, 5, 5, 5]),
        ([1, 2, 3], 4, []),
        ([1, 2, 3, 1, 2], 0, []),
        ([1, 2, 3, 1, 2], -3, []),
    ],
)
def test_what_stood_behind_the_end_before(known, most, draft) -> None:
    proposed = DraftPace(MatchCounts()).propose(ids(*known), most)
    assert proposed.token_ids.tolist() == draft
    assert len(proposed.chances) == len(draft)
    assert list(proposed.chances) == sorted(proposed.chances, reverse=True)


def first_chance(pace: DraftPace, *known: int) -> float:
    return pace.propose(ids(*known), 4).chances[0]


def test_what_is_kept_becomes_likelier_and_what_is_not_less() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    kept, wrong = DraftPace(MatchCounts()), DraftPace(MatchCounts())
    before = first_chance(kept, *text)
    assert first_chance(wrong, *text) == before
    kept.checked(4, 4)
    wrong.checked(4, 0)
    assert first_chance(wrong, *text) < before < first_chance(kept, *text)


def test_what_was_not_drafted_teaches_as_well() -> None:
    """The token that came is compared with the one that was proposed."""
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    right, wrong = DraftPace(MatchCounts()), DraftPace(MatchCounts())
    before = first_chance(right, *text)
    first_chance(wrong, *text)
    for pace, token_id in ((right, 3), (wrong, 50)):
        pace.propose(ids(*text, token_id), 0)
    assert first_chance(wrong, *text) < before < first_chance(right, *text)


def test_a_token_is_booked_once_whether_it_was_drafted_or_not() -> None:
    """All that was drafted was kept; the token behind it is compared as one that was not."""
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    drafted, not_drafted = MatchCounts(), MatchCounts()
    pace = DraftPace(drafted)
    pace.propose(ids(*text), 2)
    pace.checked(2, 2)
    pace.propose(ids(*text, 3, 4, 50), 0)
    pace = DraftPace(not_drafted)
    for end in range(len(text), len(text) + 4):
        pace.propose(ids(*text, 3, 4, 50)[:end], 4)
    lengths = range(2, 8)
    assert [drafted.chance(n) for n in lengths] == [not_drafted.chance(n) for n in lengths]


def test_a_new_row_begins_with_what_others_have_shown() -> None:
    shared = MatchCounts()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    before = first_chance(DraftPace(shared), *text)
    for _ in range(20):
        pace = DraftPace(shared)
        pace.propose(ids(*text), 4)
        pace.checked(4, 0)
    assert first_chance(DraftPace(shared), *text) < before / 2


class Certain:
    """Proposes one token again and again, with chances that are given."""

    def __init__(self, *chances: float) -> None:
        self._chances = chances or (1.0,) * 64

    def propose(self, known, most) -> Draft:
        num = min(max(most, 0), len(self._chances))
        return Draft(np.full(num, 3, dtype=np.int64), self._chances[:num])

    def checked(self, num_drafted, num_kept) -> None:
        pass


def drafter(
    *, max_tokens: int = 5, max_rows: int = 4, max_depth: int = 2, prices: PassPrices = FREE
) -> Drafter:
    return Drafter(DraftSettings(max_tokens, max_rows, max_depth), Certain, prices)


def resident(
    made: Drafter, count: int, *, num_prompt: int = 6, num_blocks: int = 4, max_new_tokens: int = 20
):
    """Return rows that have one token left to compute, of a drafter that is warm."""
    engine = make_engine(drafter=made, max_rows=8)
    rows = []
    for number in range(1, count + 1):
        row = engine.admit(new_row(number, [9] * num_prompt, max_new_tokens=max_new_tokens))
        row.num_computed = num_prompt - 1
        engine.batch.grant(row, list(range(4 * number, 4 * number + num_blocks)))
        rows.append(row)
    return rows


def lengths(made: Drafter, rows: list, num_tokens: int = 1) -> list[int]:
    work = made.added_to([RowWork(row, num_tokens) for row in rows], 4)
    return [len(item.draft) for item in work]


def test_a_row_has_as_many_as_it_may() -> None:
    made = drafter()
    assert lengths(made, resident(made, 1)) == [5]


def test_a_place_is_left_for_each_step_that_is_planned_already() -> None:
    """Of two blocks of four tokens six are known: one is drafted, one is the next step's."""
    made = drafter(max_depth=2)
    assert lengths(made, resident(made, 1, num_blocks=2)) == [1]
    made = drafter(max_depth=3)
    assert lengths(made, resident(made, 1, num_blocks=2)) == [0]


def test_nothing_is_drafted_beyond_the_end_of_an_output() -> None:
    """Of three tokens the first is drawn in any case, and the last is not computed."""
    made = drafter()
    assert lengths(made, resident(made, 1, max_new_tokens=3)) == [2]


def test_steps_with_many_rows_draft_nothing() -> None:
    made = drafter(max_rows=2)
    assert lengths(made, resident(made, 3)) == [0, 0, 0]


def test_a_step_holds_no_more_than_the_largest_one() -> None:
    """Eight logits of eight rows: three rows and five tokens of drafts."""
    made = drafter()
    work = made.added_to([RowWork(row, 1) for row in resident(made, 3)], 4)
    assert sum(item.num_computed for item in work) == 8
    assert [item.num_computed > 1 for item in work] == [False, False, True]


def test_prompts_and_rows_bound_to_grammars_draft_nothing() -> None:
    made = drafter()
    (row,) = resident(made, 1)
    row.num_computed = 2
    assert lengths(made, [row]) == [0]
    assert lengths(made, [row], num_tokens=4) == [0]
    row.num_computed, row.pace = 5, None
    assert lengths(made, [row]) == [0]


def drafted_by_price(prices: PassPrices, *chances: tuple[float, ...]) -> list[int]:
    """Return how many tokens each row has drafted, in the order of the rows."""
    made = drafter(max_tokens=4, max_rows=8, prices=prices)
    rows = resident(made, len(chances))
    for row, of_row in zip(rows, chances, strict=True):
        row.pace = Certain(*of_row)
    work = made.added_to([RowWork(row, 1) for row in rows], 4)
    return [len(item.draft) for item in sorted(work, key=lambda item: item.row.request_id)]


# A position costs a tenth of what a pass costs in any case.
DEAR = PassPrices(sizes=(1, 101), single_s=(1.0, 11.0), drafted_s=(1.0, 11.0))


def test_as_many_are_drafted_as_bring_more_tokens_in_the_time() -> None:
    assert drafted_by_price(FREE, (0.1, 0.01, 0.001)) == [3]
    assert drafted_by_price(DEAR, (0.9, 0.8, 0.7)) == [3]
    assert drafted_by_price(DEAR, (0.9, 0.3, 0.02)) == [2]
    assert drafted_by_price(DEAR, (0.05, 0.01)) == [0]


def test_a_full_step_drafts_only_what_is_nearly_certain() -> None:
    """Eight rows: a position costs a seventeenth of the step, and brings an eighth of its tokens."""
    step = [(0.3, 0.1)] * 7
    assert drafted_by_price(DEAR, *step, (0.3, 0.1)) == [0] * 8
    several = PassPrices(sizes=(1, 8, 101), single_s=(1.0, 1.0, 94.0), drafted_s=(1.0, 1.0, 94.0))
    assert drafted_by_price(several, *step, (0.99, 0.9)) == [0] * 8


def test_the_likeliest_of_all_rows_go_first() -> None:
    assert drafted_by_price(DEAR, (0.9, 0.1), (0.2, 0.1), (0.8, 0.75, 0.7)) == [1, 0, 3]


def test_nothing_is_looked_up_where_no_draft_could_pay() -> None:
    class Untouched(Certain):
        def propose(self, known, most) -> Draft:
            raise AssertionError("it was asked for a draft")

    made = drafter(max_rows=8, prices=PassPrices((1, 8, 9), (1.0, 1.0, 9.0), (1.0, 1.0, 9.0)))
    rows = resident(made, 8)
    for row in rows:
        row.pace = Untouched()
    assert lengths(made, rows) == [0] * 8


def test_drafts_that_cost_by_themselves_wait_for_more_that_are_likely() -> None:
    """A pass with any draft costs half as much again."""
    jump = PassPrices(sizes=(1, 2, 101), single_s=(1.0, 1.0, 1.0), drafted_s=(1.0, 1.5, 1.5))
    assert drafted_by_price(jump, (0.5,)) == [0]
    assert drafted_by_price(jump, (0.5, 0.4)) == [2]


def test_a_prompt_in_the_step_does_not_make_drafts_cheaper_than_they_are() -> None:
    """Its time is its own: a draft is worth what it is in a step without it."""
    made = drafter(max_tokens=4, prices=DEAR)
    alone, prompt = resident(made, 2)
    alone.pace = Certain(0.08)
    prompt.num_computed = 0
    work = made.added_to([RowWork(alone, 1), RowWork(prompt, 6)], 4)
    assert [len(item.draft) for item in work] == [0, 0]


def test_what_passes_take_is_measured_at_the_warm_up() -> None:
    """The toy's passes take more the more they compute; whatever they take, all goes on."""
    engine = make_engine(drafter=Drafter(DraftSettings(3, 4, 1)))
    row = new_row(1, [9, 8, 9, 8], max_new_tokens=20)
    outcome = engine.step(make_plan(1, [(1, 4, [0, 1, 2, 3])], new=[row]))
    assert len(tokens_of(outcome, 1)[0]) == 1


def test_an_outcome_has_all_tokens_that_are_kept() -> None:
    """Text that repeats itself: the model is made to, by a bias."""
    engine = make_engine(drafter=Drafter(DraftSettings(5, 4, 1), prices=FREE))
    row = new_row(1, [9, 9, 9, 9], max_new_tokens=20, logit_bias=LogitBias((9,), (100.0,)))
    first = engine.step(make_plan(1, [(1, 4, [0, 1, 2, 3])], new=[row]))
    assert (tokens_of(first, 1)[0], first.num_drafted) == ([9], 0)
    second = engine.step(make_plan(2, [(1, 1, [])]))
    # There is memory for the logits of four rows.
    assert tokens_of(second, 1)[0] == [9] * 4
    assert second.num_tokens == [4]
    assert (second.num_drafted, second.drafted) == (3, {1: 3})
    (kept,) = engine.batch
    assert (kept.num_tokens, kept.num_computed) == (9, 8)
