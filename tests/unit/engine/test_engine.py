"""The engine over a toy model whose tokens show every mistake with blocks and positions."""

from __future__ import annotations

import math

import pytest
from tests.helpers.toy_paged_model import (
    NAN_ID,
    POISON_ID,
    expected_tokens,
    make_engine,
    make_plan,
    new_row,
    tokens_of,
)

from lorax_contract.errors import ShardError, ValidationError
from lorax_contract.step import AdapterHandle, BlockCopy, FinishCode, NewRow
from lorax_shard.engine import forward
from lorax_shard.engine.output import RowOutput
from lorax_shard.engine.self_test import DeviceBrokenError

PROMPT = [7, 9, 11, 13, 15, 17, 19]
OTHER = [40, 41, 42]


def decode(engine, request_id, count):
    """Run ``count`` steps of one row and return its tokens."""
    ids = []
    for _ in range(count):
        outcome = engine.step(make_plan(0, [(request_id, 1, [])]))
        ids += tokens_of(outcome, request_id)[0]
    return ids


def test_prompt_and_decodes_give_the_tokens_of_the_whole_sequence():
    engine = make_engine()
    first = engine.step(make_plan(1, [(1, 7, [5, 2, 9, 4])], new=[new_row(1, PROMPT)]))
    ids = tokens_of(first, 1)[0] + decode(engine, 1, 7)
    assert ids == expected_tokens(PROMPT, 8)
    assert engine.model.passes == [[7]] + [[1]] * 7


def test_length_ends_a_row_with_its_text():
    engine = make_engine()
    outcome = engine.step(
        make_plan(1, [(1, 7, [1, 2, 3])], new=[new_row(1, PROMPT, max_new_tokens=2)])
    )
    assert outcome.finish == [FinishCode.RUNNING]
    assert not outcome.details
    outcome = engine.step(make_plan(2, [(1, 1, [])]))
    assert outcome.finish == [FinishCode.LENGTH]
    expected = engine.tokenizer.decode(expected_tokens(PROMPT, 2)).rstrip("\ufffd")
    assert outcome.details[1].generated_text == expected
    assert len(engine.batch) == 0


def test_chunks_and_decodes_share_a_pass_with_single_tokens_first():
    engine = make_engine()
    engine.step(make_plan(1, [(1, 3, [1, 2, 3])], new=[new_row(1, OTHER)]))
    outcome = engine.step(make_plan(2, [(2, 4, [7]), (1, 1, [])], new=[new_row(2, PROMPT)]))
    assert engine.model.passes[-1] == [1, 4]
    assert outcome.row_ids == [1]
    outcome = engine.step(make_plan(3, [(2, 3, [6, 8]), (1, 1, [])]))
    assert tokens_of(outcome, 1)[0] == expected_tokens(OTHER, 3)[2:]
    assert tokens_of(outcome, 2)[0] == expected_tokens(PROMPT, 1)
    assert decode(engine, 2, 4) == expected_tokens(PROMPT, 5)[1:]


def test_the_toy_sees_a_lost_block():
    engine = make_engine()
    engine.step(make_plan(1, [(1, 7, [1, 2, 3])], new=[new_row(1, PROMPT)]))
    engine.batch.tables[engine.batch.get(1).index, 0] = 9
    assert decode(engine, 1, 3) != expected_tokens(PROMPT, 4)[1:]


@pytest.mark.parametrize("split", [1, 3, 5])
def test_a_resumed_row_goes_on_without_repeating_itself(split):
    engine = make_engine()
    whole = expected_tokens(PROMPT, 6)
    row = new_row(1, PROMPT, output=whole[:split], max_new_tokens=6)
    work = [(1, 7 + split, [20, 21, 22, 23])]
    outcome = engine.step(make_plan(1, work, new=[row]))
    ids, _ = tokens_of(outcome, 1)
    ids += decode(engine, 1, 5 - split)
    assert ids == whole[split:]
    assert len(engine.batch) == 0


def test_a_preempted_row_comes_back_in_the_step_that_drops_it():
    engine = make_engine()
    engine.step(make_plan(1, [(1, 7, [1, 2])], new=[new_row(1, PROMPT)]))
    first = expected_tokens(PROMPT, 1)
    outcome = engine.step(
        make_plan(2, [(1, 8, [3, 4, 5])], new=[new_row(1, PROMPT, output=first)], drop=[1])
    )
    assert tokens_of(outcome, 1)[0] == expected_tokens(PROMPT, 2)[1:]


def test_a_row_that_ended_is_passed_over_by_a_step_planned_before():
    eos = expected_tokens(PROMPT, 1)[0]
    engine = make_engine(eos_token_ids=[eos])
    plans = [
        make_plan(1, [(1, 7, [1, 2]), (2, 3, [3, 4])], new=[new_row(1, PROMPT), new_row(2, OTHER)]),
        make_plan(2, [(1, 1, [7]), (2, 1, [5])]),
    ]
    first, second = [engine.step(plan) for plan in plans]
    assert tokens_of(first, 1) == ([eos], FinishCode.EOS_TOKEN)
    assert second.row_ids == [2]
    assert tokens_of(second, 2)[0] == expected_tokens(OTHER, 2)[1:]
    # The blocks of the row that was passed over went to nobody else.
    assert engine.batch.blocks_of(engine.batch.get(2)) == [3, 4, 5]


def test_ended_rows_are_forgotten_in_time():
    engine = make_engine()
    for request_id in range(1, 200):
        row = new_row(request_id, OTHER, max_new_tokens=1)
        outcome = engine.step(make_plan(0, [(request_id, 3, [1])], new=[row]))
        assert outcome.finish == [FinishCode.LENGTH]
    assert len(engine.batch._ended) < 100
    assert engine.step(make_plan(0, [(1, 1, [])])).finish == [FinishCode.ERROR]


@pytest.mark.parametrize(
    ("row", "work", "words"),
    [
        (None, (9, 1, [8]), "not resident"),
        (new_row(9, PROMPT), (9, 7, [8]), "blocks"),
        (new_row(9, PROMPT), (9, 8, [8, 9, 10]), "only 7 are known"),
        (new_row(9, PROMPT), (9, 7, [8, 64]), "outside the pool"),
        (new_row(9, [1, 384]), (9, 2, [8]), "vocabulary"),
        (new_row(9, []), (9, 1, [8]), "empty"),
        (new_row(9, [1, NAN_ID]), (9, 2, [8]), "finite"),
    ],
)
def test_a_bad_row_fails_alone(row, work, words):
    engine = make_engine()
    engine.step(make_plan(1, [(1, 3, [1, 2, 3])], new=[new_row(1, OTHER)]))
    good = new_row(2, PROMPT)
    new = [good] if row is None else [row, good]
    outcome = engine.step(make_plan(2, [(1, 1, []), work, (2, 7, [5, 6])], new=new))
    assert tokens_of(outcome, 9) == ([], FinishCode.ERROR)
    assert words in outcome.details[9].error_text
    assert tokens_of(outcome, 1)[0] == expected_tokens(OTHER, 2)[1:]
    assert tokens_of(outcome, 2)[0] == expected_tokens(PROMPT, 1)
    assert 9 not in engine.batch
    # A step that was planned before the failure was known passes over the row.
    outcome = engine.step(make_plan(3, [(1, 1, []), (9, 1, [11]), (2, 1, [])]))
    assert sorted(outcome.row_ids) == [1, 2]


def test_of_a_pass_that_fails_nothing_is_told_and_its_rows_leave():
    engine = make_engine()
    rows = [new_row(i, [i, POISON_ID if i in (2, 5) else 3, i + 1]) for i in range(1, 8)]
    outcome = engine.step(make_plan(1, [(i, 3, [2 * i, 2 * i + 1]) for i in range(1, 8)], new=rows))
    assert not outcome.row_ids
    assert sorted(outcome.failed) == list(range(1, 8))
    assert outcome.failure == "RuntimeError: poison"
    assert len(engine.batch) == 0
    # A step that was planned before that was known passes over them.
    outcome = engine.step(make_plan(2, [(i, 1, []) for i in range(1, 8)]))
    assert outcome.row_ids == outcome.failed == []


def test_rows_of_a_failed_pass_come_back_with_what_was_computed_before():
    engine = make_engine()
    good = new_row(1, PROMPT)
    tokens = tokens_of(engine.step(make_plan(1, [(1, 7, [1, 2, 3])], new=[good])), 1)[0]
    bad = new_row(9, [1, POISON_ID, 2])
    outcome = engine.step(make_plan(2, [(1, 1, []), (9, 3, [8])], new=[bad]))
    assert outcome.failed == [1, 9]
    again = NewRow(good.spec, tokens, 7)
    plan = make_plan(3, [(1, 1, [1, 2, 3])], new=[again], drop=[1])
    tokens += tokens_of(engine.step(plan), 1)[0]
    outcome = engine.step(make_plan(4, [(9, 3, [8])], new=[bad], drop=[9]))
    assert tokens_of(outcome, 9) == ([], FinishCode.ERROR)
    assert "the forward pass failed for this request" in outcome.details[9].error_text
    assert tokens + decode(engine, 1, 2) == expected_tokens(PROMPT, 4)


@pytest.mark.parametrize("num_before", [0, 2, 3])
def test_a_prompt_is_scored_whole_though_a_pass_with_a_part_of_it_failed(monkeypatch, num_before):
    """Of its step one pass succeeds, the second one, which another row is in too, does not."""
    scored = new_row(1, PROMPT, prompt_logprobs=True, num_prompt_alternatives=2)
    whole = make_engine().step(make_plan(1, [(1, 7, [1, 2])], new=[scored]))
    engine = make_engine()
    if num_before:
        engine.step(make_plan(1, [(1, num_before, [1, 2])], new=[scored]))
    monkeypatch.setattr(forward, "MAX_PROMPT_LOGITS", 6 - num_before)
    other = new_row(9, [POISON_ID, *OTHER], prompt_logprobs=True)
    new, blocks = ([other], []) if num_before else ([scored, other], [1, 2])
    outcome = engine.step(make_plan(2, [(1, 7 - num_before, blocks), (9, 4, [8])], new=new))
    assert outcome.failed == [1, 9]
    assert [lens[0] for lens in engine.model.passes[-2:]] == [6 - num_before, 1]
    again = NewRow(scored.spec, (), num_before)
    plan = make_plan(3, [(1, 7 - num_before, [1, 2])], new=[again], drop=[1])
    outcome = engine.step(plan)
    assert repr(outcome.details[1]) == repr(whole.details[1])
    assert tokens_of(outcome, 1) == tokens_of(whole, 1)
    # Whoever does not come back is forgotten.
    engine.step(make_plan(4, [(1, 1, [])], drop=[9]))
    assert not engine.computation.interrupted


def test_a_device_that_fails_at_a_trivial_pass_too_is_said_to_be_broken(monkeypatch):
    """A row that fails alone has not the blame, and the others do not follow it."""
    engine = make_engine()

    def broken(*_args, **_named):
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(engine.model, "forward", broken)
    plan = make_plan(2, [(2, 3, [3])], new=[new_row(2, OTHER)])
    with pytest.raises(DeviceBrokenError, match="unspecified launch failure"):
        engine.step(plan)


def test_the_self_test_after_a_failed_row_leaves_other_rows_as_they_were():
    engine = make_engine()
    rows = [new_row(1, PROMPT, max_new_tokens=6), new_row(2, [1, POISON_ID, 2, *OTHER])]
    outcomes = [engine.step(make_plan(1, [(1, 7, [1, 2, 3])], new=rows[:1]))]
    outcomes += [engine.step(make_plan(2, [(2, 6, [8, 9])], new=rows[1:]))]
    # One trivial pass, of one token, after the row that failed alone.
    assert engine.model.passes[-1] == [1]
    outcomes += [engine.step(make_plan(seq, [(1, 1, [])])) for seq in range(3, 8)]
    tokens = [token for outcome in outcomes for token in tokens_of(outcome, 1)[0]]
    assert tokens == expected_tokens(PROMPT, 6)


def test_output_that_raises_ends_its_row_only(monkeypatch):
    engine = make_engine()
    plan = make_plan(1, [(1, 7, [1, 2]), (2, 3, [3])], new=[new_row(1, PROMPT), new_row(2, OTHER)])
    bad = expected_tokens(PROMPT, 1)[0]
    push = RowOutput.push

    def failing(self, token_id):
        if token_id == bad:
            raise RuntimeError("no text")
        return push(self, token_id)

    monkeypatch.setattr(RowOutput, "push", failing)
    outcome = engine.step(plan)
    assert tokens_of(outcome, 1) == ([], FinishCode.ERROR)
    assert "no text" in outcome.details[1].error_text
    assert tokens_of(outcome, 2)[0] == expected_tokens(OTHER, 1)


def test_an_adapter_that_is_not_prepared_is_refused_for_its_row():
    engine = make_engine()
    row = new_row(1, PROMPT)
    spec = type(row.spec)(
        request_id=row.spec.request_id,
        prompt_ids=PROMPT,
        sampling=row.spec.sampling,
        stopping=row.spec.stopping,
        adapter=AdapterHandle(3),
    )
    outcome = engine.step(make_plan(1, [(1, 7, [1, 2])], new=[NewRow(spec, ())]))
    assert "without adapters" in outcome.details[1].error_text
    assert outcome.details[1].error_code == "validation"


def test_prompt_logprobs_are_the_same_over_chunks():
    whole = make_engine()
    row = new_row(1, PROMPT, prompt_logprobs=True)
    full = whole.step(make_plan(1, [(1, 7, [1, 2])], new=[row])).details[1].prompt_tokens
    chunked = make_engine()
    out = chunked.step(make_plan(1, [(1, 3, [1, 2])], new=[row]))
    assert not out.row_ids
    chunked.step(make_plan(2, [(1, 2, [])]))
    parts = chunked.step(make_plan(3, [(1, 2, [])])).details[1].prompt_tokens
    assert full.ids == parts.ids == PROMPT
    assert len(full.texts) == len(full.special) == len(full.logprobs) == 7
    assert math.isnan(full.logprobs[0])
    assert full.logprobs[1:] == parts.logprobs[1:]
    assert all(value < 0 for value in full.logprobs[1:])
    assert not chunked.step(make_plan(4, [(1, 1, [])])).details


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_prompt_logprobs_are_the_same_over_passes(monkeypatch, limit):
    rows = [
        new_row(1, PROMPT, prompt_logprobs=True, max_new_tokens=3),
        new_row(2, PROMPT[::-1], max_new_tokens=3),
        new_row(3, PROMPT[2:], prompt_logprobs=True, max_new_tokens=3),
        new_row(4, PROMPT[:1], prompt_logprobs=True, max_new_tokens=3),
    ]
    plan = [(1, 7, [1, 2]), (2, 7, [3, 4]), (3, 5, [5, 6]), (4, 1, [7])]
    whole = make_engine().step(make_plan(1, plan, new=rows))
    monkeypatch.setattr(forward, "MAX_PROMPT_LOGITS", limit)
    engine = make_engine()
    found = engine.step(make_plan(1, plan, new=rows))
    assert len(engine.model.passes) == -(-(7 + 5 + 1) // limit)
    assert sum(map(sum, engine.model.passes)) == 7 + 7 + 5 + 1
    tokens = dict(zip(found.row_ids, found.tokens.ids, strict=True))
    assert tokens == dict(zip(whole.row_ids, whole.tokens.ids, strict=True))
    assert repr(sorted(found.details.items())) == repr(sorted(whole.details.items()))


def test_a_row_that_fails_in_one_pass_is_in_no_later_one(monkeypatch):
    monkeypatch.setattr(forward, "MAX_PROMPT_LOGITS", 3)
    engine = make_engine()
    bad = new_row(1, [POISON_ID, *PROMPT], prompt_logprobs=True)
    good = new_row(2, PROMPT, prompt_logprobs=True)
    plan = make_plan(1, [(1, 8, [1, 2]), (2, 7, [3, 4])], new=[bad, good])
    outcome = engine.step(plan)
    assert outcome.finish[outcome.row_ids.index(1)] == FinishCode.ERROR
    assert outcome.row_ids.count(1) == 1
    assert outcome.tokens.ids == expected_tokens(PROMPT, 1)
    assert len(outcome.details[2].prompt_tokens.ids) == 7


def test_alternatives_come_best_first_with_texts():
    engine = make_engine()
    row = new_row(1, PROMPT, num_alternatives=3)
    outcome = engine.step(make_plan(1, [(1, 7, [1, 2])], new=[row]))
    (found,) = outcome.details[1].alternatives
    assert found.ids[0] == outcome.tokens.ids[0]
    assert found.logprobs == sorted(found.logprobs, reverse=True)
    assert len(found.texts) == 3


def test_copied_blocks_serve_another_row():
    engine = make_engine()
    engine.step(make_plan(1, [(1, 7, [1, 2])], new=[new_row(1, PROMPT)]))
    plan = make_plan(2, [(1, 1, [])], drop=[])
    plan.copies = [BlockCopy(0, 1, 0, 30)]
    engine.step(plan)
    twin = [*PROMPT[:4], 99, 98]
    row = engine.admit(new_row(2, twin), num_computed=4)
    engine.batch.grant(row, [30, 31])
    outcome = engine.step(make_plan(3, [(2, 2, [])]))
    assert tokens_of(outcome, 2)[0] == expected_tokens(twin, 1)


def test_batch_invariance_computes_each_token_alone():
    engine = make_engine(batch_invariant=True)
    rows = [new_row(1, PROMPT, prompt_logprobs=True), new_row(2, OTHER)]
    outcome = engine.step(make_plan(1, [(1, 7, [1, 2]), (2, 3, [3])], new=rows))
    assert engine.model.passes == [[1]] * 10
    assert tokens_of(outcome, 1)[0] == expected_tokens(PROMPT, 1)
    assert tokens_of(outcome, 2)[0] == expected_tokens(OTHER, 1)
    assert len(outcome.details[1].prompt_tokens.logprobs) == 7


def test_seeded_draws_do_not_depend_on_batch_mates():
    def run(mates):
        engine = make_engine()
        rows = [new_row(1, PROMPT, do_sample=True, seed=11, temperature=1.5)]
        rows += [new_row(10 + i, [i + 1] * 5, do_sample=True, seed=i) for i in range(mates)]
        work = [(1, 7, [1, 2, 3, 4])]
        work += [(10 + i, 5, [10 + 3 * i, 11 + 3 * i, 12 + 3 * i]) for i in range(mates)]
        ids = tokens_of(engine.step(make_plan(1, work, new=rows)), 1)[0]
        for _ in range(5):
            plan = make_plan(2, [(1, 1, [])] + [(10 + i, 1, []) for i in range(mates)])
            ids += tokens_of(engine.step(plan), 1)[0]
        return ids

    alone = run(0)
    assert alone == run(9)
    assert alone != expected_tokens(PROMPT, 6)


def test_a_row_may_gain_blocks_without_computing():
    engine = make_engine()
    outcome = engine.step(make_plan(1, [(1, 0, [1, 2])], new=[new_row(1, PROMPT)]))
    assert not outcome.row_ids
    assert not engine.model.passes
    outcome = engine.step(make_plan(2, [(1, 7, [])]))
    assert tokens_of(outcome, 1)[0] == expected_tokens(PROMPT, 1)


def test_more_rows_and_blocks_than_the_first_table_holds():
    engine = make_engine(num_blocks=900)
    rows = [new_row(i, [i, i + 1], max_new_tokens=100) for i in range(40)]
    work = [(i, 2, list(range(20 * i, 20 * i + 20))) for i in range(40)]
    engine.step(make_plan(1, work, new=rows))
    for _ in range(60):
        outcome = engine.step(make_plan(2, [(i, 1, []) for i in range(40)]))
    for i in (0, 7, 39):
        assert tokens_of(outcome, i)[0] == expected_tokens([i, i + 1], 61)[-1:]


def test_a_plan_that_is_no_plan_changes_nothing():
    engine = make_engine()
    engine.step(make_plan(1, [(1, 7, [1, 2])], new=[new_row(1, PROMPT)]))
    crooked = make_plan(2, [(1, 1, [])], drop=[1])
    crooked.num_new_blocks = [2]
    host_copy = make_plan(2, [(1, 1, [])], drop=[1])
    host_copy.copies = [BlockCopy(0, 1, 1, 0)]
    outside = make_plan(2, [(1, 1, [])], drop=[1])
    outside.copies = [BlockCopy(0, 1, 0, 64)]
    for plan in (crooked, host_copy, outside):
        with pytest.raises(ShardError):
            engine.step(plan)
    assert decode(engine, 1, 1) == expected_tokens(PROMPT, 2)[1:]


def test_a_row_that_is_resident_is_not_taken_in_twice():
    engine = make_engine()
    engine.admit(new_row(1, PROMPT))
    with pytest.raises(ValidationError, match="resident already"):
        engine.admit(new_row(1, PROMPT))


def test_clear_drops_all_rows():
    engine = make_engine()
    engine.step(make_plan(1, [(1, 7, [1, 2])], new=[new_row(1, PROMPT)]))
    engine.clear()
    assert len(engine.batch) == 0
    assert engine.step(make_plan(2, [(1, 1, [])])).finish == [FinishCode.ERROR]
