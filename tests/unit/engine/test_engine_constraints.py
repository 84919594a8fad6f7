"""Rows whose output is bound to a grammar, beside rows that are free."""

from __future__ import annotations

import json
import re

import pytest
from tests.helpers.constraints import choice, lark, regex, schema
from tests.helpers.thread_ranks import run_ranks
from tests.helpers.tiny_models import EOS
from tests.helpers.toy_adapters import ToyAdapter, ToyPrepared, using
from tests.helpers.toy_adapters import make_engine as make_engine_with_slots
from tests.helpers.toy_paged_model import (
    expected_tokens,
    make_engine,
    make_plan,
    new_row,
    toy_tokenizer,
)
from tokenizers import Tokenizer

from lorax_contract.errors import ValidationError
from lorax_contract.step import FinishCode, LogitBias
from lorax_shard.constraints.matchers import MatcherSource
from lorax_shard.vocabulary import vocabulary_of

PROMPT = [7, 9, 11, 13, 15, 17, 19]
END = toy_tokenizer().token_to_id(EOS)
BLOCKS = list(range(1, 17))


def run(engine, row, *, blocks=BLOCKS, max_steps=60):
    """Run one row to its end; return its ids, its finish code and its detail."""
    request_id = row.spec.request_id
    num_known = len(row.spec.prompt_ids) + len(row.output_ids)
    plan = make_plan(1, [(request_id, num_known, blocks)], new=[row])
    ids = []
    for _ in range(max_steps):
        outcome = engine.step(plan)
        ids += outcome.tokens.ids
        if outcome.finish[0] != FinishCode.RUNNING:
            return ids, FinishCode(outcome.finish[0]), outcome.details.get(request_id)
        plan = make_plan(2, [(request_id, 1, [])])
    raise AssertionError("the row has no end")


def bound_engine(**options):
    return make_engine(eos_token_ids=[END], constrained=True, **options)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 5, "temperature": 1.7}])
def test_an_output_fits_its_grammar_and_ends_with_it(sampling):
    engine = bound_engine()
    row = new_row(1, PROMPT, constraint=regex("[a-f]{3}-[0-9]{2}"), max_new_tokens=30, **sampling)
    ids, finish, detail = run(engine, row)
    assert re.fullmatch("[a-f]{3}-[0-9]{2}", detail.generated_text)
    assert (finish, ids[-1]) == (FinishCode.EOS_TOKEN, END)


def test_penalties_and_warpers_choose_among_what_is_allowed():
    options = {"repetition_penalty": 3.0, "frequency_penalty": 2.0, "top_k": 5, "top_p": 0.5,
               "typical_p": 0.5, "min_p": 0.2, "do_sample": True, "seed": 3}  # fmt: skip
    row = new_row(1, PROMPT, constraint=regex("(ab){8}"), max_new_tokens=40, **options)
    _, finish, detail = run(bound_engine(), row)
    assert (finish, detail.generated_text) == (FinishCode.EOS_TOKEN, "ab" * 8)


def test_a_free_row_draws_the_same_beside_a_bound_one():
    engine = bound_engine()
    bound = new_row(1, PROMPT, constraint=choice("the quick fox"), max_new_tokens=20)
    outcome = engine.step(
        make_plan(1, [(1, 7, BLOCKS[:8]), (2, 7, BLOCKS[8:])], new=[bound, new_row(2, PROMPT)])
    )
    free = [outcome.tokens.ids[outcome.row_ids.index(2)]]
    for seq in range(2, 6):
        outcome = engine.step(make_plan(seq, [(1, 1, []), (2, 1, [])]))
        free.append(outcome.tokens.ids[outcome.row_ids.index(2)])
    assert free == expected_tokens(PROMPT, 5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_row_that_comes_back_goes_on_as_if_it_had_never_left(count):
    constraint = schema({
        "type": "object", "properties": {"a": {"enum": ["xx", "yy", "zz"]}}, "required": ["a"],
        "additionalProperties": False, "x-guidance": {"whitespace_flexible": False},
    })  # fmt: skip
    sampling = {"do_sample": True, "seed": 11, "max_new_tokens": 40, "constraint": constraint}
    whole, _, detail = run(bound_engine(), new_row(1, PROMPT, **sampling))
    assert json.loads(detail.generated_text)["a"] in ("xx", "yy", "zz")
    engine = bound_engine()
    again, _, _ = run(engine, new_row(1, PROMPT, output=whole[:count], **sampling))
    assert whole[:count] + again == whole


def test_logprobs_are_those_of_what_is_allowed():
    engine = bound_engine()
    row = new_row(1, PROMPT, constraint=choice("a", "b"), num_alternatives=9, max_new_tokens=5)
    outcome = engine.step(make_plan(1, [(1, 7, BLOCKS)], new=[row]))
    alternatives = outcome.details[1].alternatives[0]
    assert set(alternatives.texts) == {"a", "b"}
    assert sum(2.718281828**each for each in alternatives.logprobs) == pytest.approx(1.0, rel=1e-4)


def test_an_output_that_must_not_end_ends_only_where_it_has_to():
    """The end of a grammar is an end, whatever a request says of the model's end token."""
    row = new_row(1, PROMPT, constraint=regex("a{1,6}"), ignore_eos=True, max_new_tokens=20)
    _, finish, detail = run(bound_engine(), row)
    assert (finish, detail.generated_text) == (FinishCode.EOS_TOKEN, "aaaaaa")


@pytest.mark.parametrize(("least", "fewest"), [(0, 0), (3, 3), (5, 5), (50, 6)])
def test_the_least_number_of_tokens_holds_the_end_back_while_more_may_come(least, fewest):
    for seed in range(8):
        row = new_row(1, PROMPT, constraint=regex("a{0,6}"), min_new_tokens=least, do_sample=True,
                      seed=seed, temperature=9.0, max_new_tokens=60)  # fmt: skip
        ids, finish, detail = run(bound_engine(), row)
        assert finish == FinishCode.EOS_TOKEN
        assert re.fullmatch("a{0,6}", detail.generated_text)
        assert len(ids) - 1 >= fewest or detail.generated_text == "aaaaaa"


def test_a_bias_prefers_among_what_is_allowed():
    a, b = (toy_tokenizer().token_to_id(each) for each in "ab")
    for favourite, text in ((a, "a"), (b, "b")):
        bias = LogitBias((favourite, END), (100.0, 100.0))
        row = new_row(1, PROMPT, constraint=choice("a", "b"), logit_bias=bias)
        assert run(bound_engine(), row)[2].generated_text == text


def test_a_row_that_asks_for_no_tokens_is_bound_to_nothing():
    engine = bound_engine()
    row = new_row(1, PROMPT, constraint=lark("start: nothing"), max_new_tokens=0)
    outcome = engine.step(make_plan(1, [(1, 7, BLOCKS)], new=[row]))
    assert outcome.finish == [FinishCode.LENGTH]


def test_stop_strings_end_a_bound_row_too():
    row = new_row(1, PROMPT, constraint=regex("a{9}"), stop_sequences=("aaa",), max_new_tokens=20)
    _, finish, detail = run(bound_engine(), row)
    assert finish == FinishCode.STOP_SEQUENCE
    assert detail.generated_text.endswith("aaa")


def test_the_limit_ends_a_bound_row_in_the_midst():
    row = new_row(1, PROMPT, constraint=regex("[a-z]{30}"), max_new_tokens=3)
    ids, finish, _ = run(bound_engine(), row)
    assert (len(ids), finish) == (3, FinishCode.LENGTH)


def test_a_grammar_that_cannot_be_used_ends_its_row_alone():
    engine = bound_engine()
    broken = new_row(1, PROMPT, constraint=lark("start: nothing"))
    outcome = engine.step(
        make_plan(1, [(1, 7, BLOCKS[:8]), (2, 7, BLOCKS[8:])], new=[broken, new_row(2, PROMPT)])
    )
    finishes = dict(zip(outcome.row_ids, outcome.finish, strict=True))
    assert finishes == {1: FinishCode.ERROR, 2: FinishCode.RUNNING}
    assert "grammar cannot be used" in outcome.details[1].error_text
    assert outcome.tokens.ids == expected_tokens(PROMPT, 1)


def test_an_output_that_its_grammar_forbids_ends_its_row_alone():
    """The output of an earlier residence is what the router says it is."""
    engine = bound_engine()
    row = new_row(1, PROMPT, output=[PROMPT[0]] * 3, constraint=regex("[0-9]+"))
    outcome = engine.step(
        make_plan(1, [(1, 10, BLOCKS[:8]), (2, 7, BLOCKS[8:])], new=[row, new_row(2, PROMPT)])
    )
    finishes = dict(zip(outcome.row_ids, outcome.finish, strict=True))
    assert finishes == {1: FinishCode.ERROR, 2: FinishCode.RUNNING}
    assert "cannot be kept to its grammar" in outcome.details[1].error_text


def test_where_outputs_cannot_be_bound_a_row_is_refused_alone():
    engine = make_engine(eos_token_ids=[END])
    with pytest.raises(ValidationError, match="llguidance is not installed"):
        engine.admit(new_row(1, PROMPT, constraint=regex("a")))


def test_a_step_without_bound_rows_asks_nobody_for_masks(monkeypatch):
    engine = bound_engine()
    monkeypatch.setattr(engine.constraints, "advance", None)
    monkeypatch.setattr(engine.constraints, "enter", None)
    ids, _, _ = run(engine, new_row(1, PROMPT))
    assert ids == expected_tokens(PROMPT, 8)


def test_an_adapter_s_own_tokens_are_bound_beside_the_base_s():
    tokenizer = Tokenizer.from_str(toy_tokenizer().to_str())
    tokenizer.add_tokens(["🦊fox"])
    tokenizer.add_special_tokens(["<end of mine>"])
    vocabulary = vocabulary_of(tokenizer, "<end of mine>")
    own_fox, own_end = len(vocabulary) - 2, len(vocabulary) - 1
    lane = ToyPrepared({4: ToyAdapter(own_fox, vocabulary=vocabulary, vocab_size=len(vocabulary))})
    engine, _ = make_engine_with_slots(lane, eos_token_ids=[END])
    constraint = choice("🦊fox", "🦊foxes")
    rows = [
        using(new_row(1, PROMPT, constraint=constraint), 4),
        new_row(2, PROMPT, constraint=constraint),
    ]
    plan = make_plan(1, [(1, 7, BLOCKS[:8]), (2, 7, BLOCKS[8:])], new=rows)
    plan.activate = [4]
    ids, texts = {1: [], 2: []}, {}
    while len(texts) < 2:
        outcome = engine.step(plan)
        for request_id, token_id in zip(outcome.row_ids, outcome.tokens.ids, strict=True):
            ids[request_id].append(token_id)
        texts |= {each: detail.generated_text for each, detail in outcome.details.items()}
        plan = make_plan(2, [(each, 1, []) for each in (1, 2) if each not in texts])
    assert texts[1] in ("🦊fox", "🦊foxes")
    assert texts[2] in ("🦊fox", "🦊foxes")
    assert ids[1][0] == own_fox
    assert ids[1][-1] in (END, own_end)
    assert max(ids[2]) < own_fox


def test_rank_0_binds_for_all():
    def work(group):
        engine = make_engine(eos_token_ids=[END], constrained=True, group=group)
        row = new_row(1, PROMPT, constraint=choice("the dog", "a fox"), max_new_tokens=20)
        ids, finish, detail = run(engine, row)
        return engine.constraints is not None, ids, finish, detail and detail.generated_text

    first, second = run_ranks(2, work)
    assert first[3] in ("the dog", "a fox")
    assert (first[0], second[0]) == (True, False)
    assert first[1:3] == second[1:3]


def test_steps_launched_beyond_the_end_of_an_output_are_nobodys(monkeypatch):
    """Who launches learns of an end later; a grammar that is over is no error and compiles nothing."""
    compiled = []
    monkeypatch.setattr(MatcherSource, "compiled", compiled.append)
    engine = bound_engine()
    row = new_row(1, PROMPT, constraint=regex("ab"), max_new_tokens=30)
    plans = [make_plan(1, [(1, 7, BLOCKS)], new=[row])]
    plans += [make_plan(seq, [(1, 1, [])]) for seq in range(2, 9)]
    launched = [engine.launch(plan) for plan in plans]
    outcomes = [engine.collect(each) for each in launched]
    assert [code for outcome in outcomes for code in outcome.finish][-1] == FinishCode.EOS_TOKEN
    ids = [token_id for outcome in outcomes for token_id in outcome.tokens.ids]
    assert ids.count(END) == 1
    assert ids[-1] == END
    assert outcomes[-1].row_ids == []
    assert compiled == []
    assert engine.step(make_plan(9, [(1, 1, [])])).row_ids == []
    assert len(engine.batch) == 0
