"""Adapters in steps: they take effect and cease between rows, and fail only their own rows."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.toy_adapters import ToyAdapter, ToyPrepared, make_engine, using
from tests.helpers.toy_paged_model import (
    VOCAB_SIZE,
    expected_tokens,
    make_plan,
    new_row,
    toy_tokenizer,
)

from lorax_contract.errors import ValidationError
from lorax_contract.step import AdapterHandle, FinishCode, LogitBias, StepOutcome, StepPlan
from lorax_shard.vocabulary import vocabulary_of

PROMPT, OTHER = [7, 9, 11, 13, 15], [40, 41, 42]
ONE, TWO, THREE = AdapterHandle(1), AdapterHandle(2), AdapterHandle(3)
OWN_TOKENS = 6


@pytest.fixture
def lane() -> ToyPrepared:
    return ToyPrepared({ONE: ToyAdapter(101), TWO: ToyAdapter(102), THREE: ToyAdapter(103)})


def plan(seq: int, work=(), *, activate=(), deactivate=(), **rest) -> StepPlan:
    made = make_plan(seq, work, **rest)
    made.activate.extend(activate)
    made.deactivate.extend(deactivate)
    return made


def tokens(outcome: StepOutcome) -> dict[int, int]:
    """Return the one token of each row that has one."""
    with_one = [
        row for row, count in zip(outcome.row_ids, outcome.num_tokens, strict=True) if count
    ]
    return dict(zip(with_one, outcome.tokens.ids, strict=True))


def errors(outcome: StepOutcome) -> dict[int, str]:
    return {
        request_id: outcome.details[request_id].error_text or ""
        for request_id, finish in zip(outcome.row_ids, outcome.finish, strict=True)
        if finish == FinishCode.ERROR
    }


def test_rows_of_adapters_and_of_the_base_share_steps(lane: ToyPrepared) -> None:
    engine, model = make_engine(lane)
    rows = [using(new_row(1, PROMPT), ONE), new_row(2, PROMPT), using(new_row(3, OTHER), TWO)]
    work = [(1, 5, [1, 2, 3]), (2, 5, [4, 5, 6]), (3, 3, [7, 8, 9])]
    outcome = engine.step(plan(1, work, new=rows, activate=[ONE, TWO]))
    assert tokens(outcome) == {1: 101, 2: expected_tokens(PROMPT, 1)[0], 3: 102}
    assert model.row_slots == [[0, None, 1]]


def test_a_row_whose_adapter_is_not_in_effect_fails_alone(lane: ToyPrepared) -> None:
    engine, _ = make_engine(lane)
    rows = [using(new_row(1, PROMPT), TWO), using(new_row(2, OTHER), ONE), new_row(3, OTHER)]
    work = [(1, 5, [1, 2]), (2, 3, [3]), (3, 3, [4])]
    outcome = engine.step(plan(1, work, new=rows, activate=[ONE]))
    assert errors(outcome).keys() == {1}
    assert "adapter handle 2 is not in effect" in errors(outcome)[1]
    assert tokens(outcome) == {2: 101, 3: expected_tokens(OTHER, 1)[0]}
    # The step that was planned before the failure was known passes over it.
    later = engine.step(plan(2, [(1, 1, []), (2, 1, []), (3, 1, [])]))
    assert tokens(later).keys() == {2, 3}


def test_an_adapter_that_cannot_take_effect_fails_its_rows_alone(lane: ToyPrepared) -> None:
    lane[TWO] = ToyAdapter(-1)
    engine, model = make_engine(lane)
    rows = [using(new_row(1, PROMPT), TWO), using(new_row(2, OTHER), ONE)]
    rows += [using(new_row(3, OTHER), 9)]
    work = [(1, 5, [1, 2]), (2, 3, [3]), (3, 3, [4])]
    outcome = engine.step(plan(1, work, new=rows, activate=[TWO, AdapterHandle(9), ONE]))
    assert errors(outcome).keys() == {1, 3}
    assert tokens(outcome) == {2: 101}
    # The outcome says so and why, to the rows' clients too.
    assert outcome.inactive.keys() == {TWO, 9}
    assert "this adapter cannot be loaded" in outcome.inactive[TWO]
    assert "this adapter cannot be loaded" in errors(outcome)[1]
    assert "not prepared" in errors(outcome)[3]
    # What failed took no slot.
    assert list(model.slots.loaded) == [0]
    assert TWO not in engine.adapters


def test_an_adapter_that_did_not_take_effect_can_the_next_time(lane: ToyPrepared) -> None:
    good, lane[TWO] = lane[TWO], ToyAdapter(-1)
    engine, model = make_engine(lane)
    engine.step(plan(1, activate=[ONE]))
    first = plan(2, [(1, 5, [1, 2])], new=[using(new_row(1, PROMPT), TWO)], activate=[TWO])
    assert engine.step(first).inactive.keys() == {TWO}
    # A step that was planned before that was known: its rows fail in the same words.
    late = engine.step(plan(3, [(2, 5, [1, 2])], new=[using(new_row(2, PROMPT), TWO)]))
    assert "cannot be loaded" in errors(late)[2]
    lane[TWO] = good
    again = plan(4, [(3, 5, [1, 2])], new=[using(new_row(3, PROMPT), TWO)], activate=[TWO])
    outcome = engine.step(again)
    assert outcome.inactive == {}
    assert tokens(outcome) == {3: 102}
    assert model.slots.loaded == {0: lane[ONE], 1: good}


def test_an_adapter_that_ceases_under_a_live_row_ends_that_row(lane: ToyPrepared) -> None:
    engine, model = make_engine(lane)
    rows = [using(new_row(1, PROMPT), ONE), using(new_row(2, OTHER), TWO)]
    engine.step(plan(1, [(1, 5, [1, 2]), (2, 3, [3])], new=rows, activate=[ONE, TWO]))
    outcome = engine.step(plan(2, [(1, 1, []), (2, 1, [])], deactivate=[ONE]))
    assert errors(outcome).keys() == {1}
    assert tokens(outcome) == {2: 102}
    assert model.slots.loaded == {1: lane[TWO]}
    assert [row.request_id for row in engine.batch] == [2]


def test_slots_are_used_again(lane: ToyPrepared) -> None:
    engine, model = make_engine(lane)
    engine.step(plan(1, activate=[ONE, TWO]))
    engine.step(plan(2, deactivate=[ONE], activate=[THREE]))
    assert model.slots.loaded == {0: lane[THREE], 1: lane[TWO]}
    row = using(new_row(1, PROMPT), THREE)
    assert tokens(engine.step(plan(3, [(1, 5, [1, 2])], new=[row]))) == {1: 103}
    engine.step(plan(4, drop=[1], deactivate=[THREE, TWO]))
    assert model.slots.loaded == {}
    for seq, handle in enumerate([ONE, TWO, THREE] * 3, start=5):
        engine.step(plan(seq, activate=[handle], deactivate=[TWO, ONE, THREE]))
        assert set(model.slots.loaded) == {0}


def test_orders_may_be_repeated(lane: ToyPrepared) -> None:
    engine, model = make_engine(lane)
    engine.step(plan(1, activate=[ONE]))
    engine.step(plan(2, activate=[ONE], deactivate=[TWO]))
    assert model.slots.loaded == {0: lane[ONE]}


def test_a_row_that_leaves_may_take_its_adapter_along(lane: ToyPrepared) -> None:
    engine, model = make_engine(lane)
    row = using(new_row(1, PROMPT), ONE)
    engine.step(plan(1, [(1, 5, [1, 2])], new=[row], activate=[ONE]))
    again = using(new_row(1, PROMPT, output=[101]), ONE)
    outcome = engine.step(
        plan(2, [(1, 6, [1, 2])], new=[again], drop=[1], deactivate=[ONE], activate=[ONE])
    )
    assert tokens(outcome) == {1: 101}
    assert model.slots.loaded == {0: lane[ONE]}


def test_a_shard_without_adapters_refuses_rows_that_name_one() -> None:
    from tests.helpers.toy_paged_model import make_engine as make_plain

    engine = make_plain()
    outcome = engine.step(plan(1, [(1, 5, [1, 2])], new=[using(new_row(1, PROMPT), ONE)]))
    assert "without adapters" in errors(outcome)[1]
    later = engine.step(plan(2, activate=[ONE], deactivate=[ONE]))
    assert later.row_ids == []
    assert "without adapters" in later.inactive[ONE]


# --- adapters with tokens of their own -----------------------------------------------------


@pytest.fixture
def own_tokens(lane: ToyPrepared) -> ToyPrepared:
    """TWO adds tokens and has a tokenizer that knows them."""
    tokenizer = copy.deepcopy(toy_tokenizer())
    base = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<own {at}>" for at in range(VOCAB_SIZE + OWN_TOKENS - base)])
    lane[TWO] = ToyAdapter(
        VOCAB_SIZE + 2, vocabulary=vocabulary_of(tokenizer, "<own 5>"),
        vocab_size=VOCAB_SIZE + OWN_TOKENS,
    )  # fmt: skip
    return lane


def test_base_rows_keep_every_bit_beside_wider_ones(own_tokens: ToyPrepared) -> None:
    def served(beside: AdapterHandle) -> str:
        engine, _ = make_engine(own_tokens)
        rows = [
            new_row(1, PROMPT, do_sample=True, seed=8, temperature=1.5, num_alternatives=5),
            new_row(2, OTHER, prompt_logprobs=True, num_alternatives=2),
            using(new_row(3, OTHER, do_sample=True, seed=2), beside),
        ]
        work = [(1, 5, [1, 2, 3, 4]), (2, 3, [5, 6, 7]), (3, 3, [8, 9, 10])]
        first = plan(1, work, new=rows, activate=[ONE, TWO, THREE])
        outcomes = [engine.step(first)]
        outcomes += [engine.step(plan(seq, [(1, 1, []), (2, 1, [])])) for seq in range(2, 7)]
        seen = []
        for outcome in outcomes:
            columns = outcome.tokens
            start = 0
            for request_id, count in zip(outcome.row_ids, outcome.num_tokens, strict=True):
                end = start + count
                if request_id != 3:
                    detail = outcome.details.get(request_id)
                    seen.append((request_id, columns.ids[start:end], columns.logprobs[start:end],
                                 columns.texts[start:end], detail))  # fmt: skip
                start = end
        return repr(seen)

    assert served(TWO) == served(ONE)


def test_texts_of_a_row_are_its_own_tokenizers(own_tokens: ToyPrepared) -> None:
    engine, _ = make_engine(own_tokens)
    prompt = [*PROMPT, VOCAB_SIZE + 1]
    row = using(new_row(1, prompt, max_new_tokens=2, num_alternatives=3, prompt_logprobs=True), TWO)
    outcome = engine.step(plan(1, [(1, 6, [1, 2])], new=[row], activate=[TWO]))
    assert outcome.tokens.ids == [VOCAB_SIZE + 2]
    assert outcome.tokens.texts == ["<own 2>"]
    detail = outcome.details[1]
    assert detail.alternatives[0].ids[0] == VOCAB_SIZE + 2
    assert detail.alternatives[0].texts[0] == "<own 2>"
    assert detail.prompt_tokens.texts[-1] == "<own 1>"
    last = engine.step(plan(2, [(1, 1, [])]))
    assert last.details[1].generated_text == "<own 2><own 2>"


def test_tokens_of_one_adapter_are_none_of_another(own_tokens: ToyPrepared) -> None:
    engine, _ = make_engine(own_tokens)
    rows = [using(new_row(1, [VOCAB_SIZE + 1]), TWO), using(new_row(2, [VOCAB_SIZE + 1]), ONE)]
    rows += [new_row(3, [VOCAB_SIZE + 1]), using(new_row(4, [VOCAB_SIZE + OWN_TOKENS]), TWO)]
    outcome = engine.step(
        plan(1, [(number, 1, [number]) for number in range(1, 5)], new=rows, activate=[ONE, TWO])
    )
    assert errors(outcome).keys() == {2, 3, 4}
    assert f"vocabulary of {VOCAB_SIZE}" in errors(outcome)[2]
    assert f"vocabulary of {VOCAB_SIZE + OWN_TOKENS}" in errors(outcome)[4]
    assert tokens(outcome) == {1: VOCAB_SIZE + 2}


def test_the_adapters_own_end_ends_its_rows(own_tokens: ToyPrepared) -> None:
    end = toy_tokenizer().id_to_token(101)
    own_tokens[ONE] = ToyAdapter(101, vocabulary=vocabulary_of(toy_tokenizer(), end))
    engine, _ = make_engine(own_tokens)
    rows = [using(new_row(1, PROMPT), ONE), using(new_row(2, PROMPT), THREE)]
    work = [(1, 5, [1, 2]), (2, 5, [3, 4])]
    outcome = engine.step(plan(1, work, new=rows, activate=[ONE, THREE]))
    assert outcome.finish == [FinishCode.EOS_TOKEN, FinishCode.RUNNING]


def test_what_is_not_in_effect_is_named() -> None:
    engine, _ = make_engine(ToyPrepared())
    assert engine.adapters is not None
    with pytest.raises(ValidationError, match="handle 4 is not prepared"):
        engine.adapters.activate(AdapterHandle(4))
    with pytest.raises(ValidationError, match="handle 4 is not in effect"):
        engine.adapters[AdapterHandle(4)]


def test_what_ends_an_adapters_output_is_banned_before_its_least_length(lane: ToyPrepared) -> None:
    """Its own tokens that end a text, not the base's; its bias may name its own tokens."""
    tokenizer = copy.deepcopy(toy_tokenizer())
    count = VOCAB_SIZE + OWN_TOKENS - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<own {at}>" for at in range(count)])
    own_end = VOCAB_SIZE + OWN_TOKENS - 1
    lane[ONE] = ToyAdapter(
        own_end, vocabulary=vocabulary_of(tokenizer, f"<own {count - 1}>"), vocab_size=own_end + 1
    )
    engine, _ = make_engine(lane)
    bias = LogitBias((own_end - 1,), (50.0,))
    rows = [
        using(new_row(1, PROMPT, min_new_tokens=2, logit_bias=bias), ONE),
        new_row(2, PROMPT, min_new_tokens=2),
    ]
    work = [(1, 5, [1, 2, 3]), (2, 5, [4, 5, 6])]
    drawn = [engine.step(plan(1, work, new=rows, activate=[ONE]))]
    drawn += [engine.step(plan(seq, [(1, 1, []), (2, 1, [])])) for seq in (2, 3)]
    assert [tokens(outcome)[1] for outcome in drawn] == [own_end - 1, own_end - 1, own_end]
    assert drawn[2].finish[drawn[2].row_ids.index(1)] == FinishCode.EOS_TOKEN
    assert [tokens(outcome)[2] for outcome in drawn] == expected_tokens(PROMPT, 3)


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 14), st.sampled_from([0, 1, 2])), min_size=1,
        max_size=4,
    ),
    data=st.data(),
)  # fmt: skip
def test_an_adapter_acts_on_the_tokens_from_its_start_on_however_they_are_cut(
    rows: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Chunks of any sizes, starts inside them, at their ends, and behind all tokens."""
    engine, model = make_engine(ToyPrepared({ONE: ToyAdapter(101), TWO: ToyAdapter(102)}))
    new = []
    for number, (length, start, handle) in enumerate(rows, start=1):
        row = using(new_row(number, [9] * length, max_new_tokens=4), handle)
        new.append(replace(row, spec=replace(row.spec, adapter_start=start)))
    blocks = [[4 * number + place for place in range(4)] for number in range(len(rows))]
    done = [0] * len(rows)
    got: list[list[int | None]] = [[] for _ in rows]
    seq = 0
    while any(at < length + 3 for at, (length, _, _) in zip(done, rows, strict=True)):
        seq += 1
        counts = {}
        for number, (length, _, _) in enumerate(rows):
            left = max(length - done[number], 1 if done[number] < length + 3 else 0)
            if left:
                counts[number] = data.draw(st.integers(1, left))
        work = [
            (number + 1, num, [] if done[number] else blocks[number])
            for number, num in counts.items()
        ]
        entering = {"new": new, "activate": [ONE, TWO]} if seq == 1 else {}
        engine.step(plan(seq, work, **entering))
        runs = [
            slot
            for slot, num in zip(model.row_slots[-1], model.slot_lens[-1], strict=True)
            for _ in range(num)
        ]
        for number in sorted(counts, key=lambda each: counts[each] > 1):
            got[number] += runs[: counts[number]]
            runs = runs[counts[number] :]
            done[number] += counts[number]
        assert not runs
    for slots, (_, start, handle) in zip(got, rows, strict=True):
        slot = {0: None, 1: 0, 2: 1}[handle]
        assert slots == [slot if place >= start else None for place in range(len(slots))]


def test_a_request_of_an_invoked_adapter_finds_its_place_itself_where_nobody_tells(
    lane: ToyPrepared,
) -> None:
    """LoRAX's own messages have no word for it."""
    lane[ONE] = ToyAdapter(101, invocation_ids=(11, 13))
    engine, model = make_engine(lane)
    engine.step(plan(1, [(1, 5, [1, 2, 3])], new=[using(new_row(1, PROMPT), ONE)], activate=[ONE]))
    assert (model.row_slots[-1], model.slot_lens[-1]) == ([None, 0], [2, 3])
    lane[TWO] = ToyAdapter(102, invocation_ids=(14,))
    outcome = engine.step(
        plan(2, [(2, 5, [4, 5, 6])], new=[using(new_row(2, PROMPT), TWO)], activate=[TWO])
    )
    assert tokens(outcome) == {2: expected_tokens(PROMPT, 1)[0]}
