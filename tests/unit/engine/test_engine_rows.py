"""The engine's rows of other kinds: biased, of a least length, and those that ask for no token."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from tests.helpers.toy_paged_model import (
    POISON_ID,
    expected_tokens,
    make_engine,
    make_plan,
    new_row,
    tokens_of,
)

from lorax_contract.step import Alternatives, FinishCode, LogitBias
from lorax_shard.engine.outcome import TokenTexts
from lorax_shard.engine.self_test import DeviceBrokenError

PROMPT = [7, 9, 11, 13, 15, 17, 19]
OTHER = [40, 41, 42]


def serve_alone(row, engine=None):
    """Run a row to its end, its prompt in one chunk; return ids, finish and last detail."""
    engine = engine or make_engine()
    num, blocks = len(row.spec.prompt_ids) + len(row.output_ids), [1, 2, 3, 4, 5]
    outcome = engine.step(make_plan(1, [(1, num, blocks)], new=[row]))
    ids, finish = tokens_of(outcome, 1)
    while finish == FinishCode.RUNNING:
        outcome = engine.step(make_plan(2, [(1, 1, [])]))
        more, finish = tokens_of(outcome, 1)
        ids += more
    return ids, finish, outcome.details[1]


def test_a_bias_holds_for_each_token_and_across_a_preemption():
    banned = expected_tokens(PROMPT, 8)[:2]
    bias = {"logit_bias": LogitBias((*banned, 77), (-100.0, -100.0, 0.5))}
    whole, _, _ = serve_alone(new_row(1, PROMPT, **bias))
    assert not set(banned) & set(whole)
    for split in (1, 4, 7):
        rest, _, _ = serve_alone(new_row(1, PROMPT, output=whole[:split], **bias))
        assert whole[:split] + rest == whole
    forced = {"logit_bias": LogitBias((77,), (100.0,))}
    assert serve_alone(new_row(1, PROMPT, **forced))[0] == [77] * 8


@pytest.mark.parametrize(
    "bias", [LogitBias((384,), (1.0,)), LogitBias((-1,), (1.0,)), LogitBias((3,), (math.nan,)),
             LogitBias((3, 4), (1.0,))],
)  # fmt: skip
def test_a_bias_that_is_none_ends_its_row_only(bias):
    engine = make_engine()
    assert engine.model.vocab_size == 384
    rows = [new_row(1, PROMPT, logit_bias=bias), new_row(2, OTHER)]
    outcome = engine.step(make_plan(1, [(1, 7, [1, 2]), (2, 3, [3])], new=rows))
    assert tokens_of(outcome, 1) == ([], FinishCode.ERROR)
    assert "logit bias" in outcome.details[1].error_text
    assert tokens_of(outcome, 2)[0] == expected_tokens(OTHER, 1)


@pytest.mark.parametrize("split", [0, 1, 3, 4])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_nothing_that_ends_an_output_is_drawn_before_its_least_length(split, ignore_eos):
    plain = expected_tokens(PROMPT, 8)
    eos, stop = plain[1], plain[2]
    engine = make_engine(eos_token_ids=[eos])
    limits = {"min_new_tokens": 4, "stop_token_ids": (stop,), "ignore_eos": ignore_eos}
    # As likely as can be, when they may come.
    limits["logit_bias"] = LogitBias((eos,), (100.0,))
    ids, finish, _ = serve_alone(new_row(1, PROMPT, **limits), engine)
    assert not {eos, stop} & set(ids[:4])
    assert ids[4] == eos
    assert finish == (FinishCode.LENGTH if ignore_eos else FinishCode.EOS_TOKEN)
    assert len(ids) == (8 if ignore_eos else 5)
    resumed = new_row(1, PROMPT, output=ids[:split], **limits)
    assert serve_alone(resumed, make_engine(eos_token_ids=[eos]))[0] == ids[split:]


def test_a_row_of_which_no_token_is_asked_ends_with_its_prompt():
    engine = make_engine()
    rows = [new_row(1, PROMPT, max_new_tokens=0), new_row(2, OTHER)]
    outcome = engine.step(make_plan(1, [(1, 3, [1]), (2, 3, [3])], new=rows))
    assert outcome.row_ids == [2]
    outcome = engine.step(make_plan(2, [(1, 4, [2]), (2, 1, [])]))
    assert tokens_of(outcome, 1) == ([], FinishCode.LENGTH)
    assert outcome.details[1].generated_text == ""
    assert outcome.details[1].prompt_tokens is None
    assert outcome.tokens.ids == expected_tokens(OTHER, 2)[1:]
    assert [row.request_id for row in engine.batch] == [2]
    # A step that was planned before its end was known passes over it.
    assert engine.step(make_plan(3, [(1, 1, []), (2, 1, [])])).row_ids == [2]


def test_a_step_of_rows_without_tokens_computes_no_logits():
    engine = make_engine()
    outcome = engine.step(
        make_plan(1, [(1, 7, [1, 2])], new=[new_row(1, PROMPT, max_new_tokens=0)])
    )
    assert outcome.finish == [FinishCode.LENGTH]
    assert outcome.tokens.ids == []
    assert engine.model.passes == [[7]]


@pytest.mark.parametrize("max_new_tokens", [0, 3])
@pytest.mark.parametrize("chunks", [(7,), (1, 6), (3, 3, 1)])
def test_what_a_prompt_reports_is_the_same_over_chunks_and_with_tokens_or_without(
    chunks, max_new_tokens
):
    options = {"prompt_logprobs": True, "num_prompt_alternatives": 3}
    row = new_row(1, PROMPT, max_new_tokens=3, **options)
    whole = make_engine().step(make_plan(1, [(1, 7, [1, 2])], new=[row])).details[1]
    engine = make_engine()
    row = new_row(1, PROMPT, max_new_tokens=max_new_tokens, **options)
    for at, num in enumerate(chunks):
        new, blocks = ([], []) if at else ([row], [1, 2])
        outcome = engine.step(make_plan(at + 1, [(1, num, blocks)], new=new))
    found = outcome.details[1]
    assert repr(found.prompt_tokens) == repr(whole.prompt_tokens)
    assert found.prompt_alternatives == whole.prompt_alternatives
    first, *others = found.prompt_alternatives
    assert first == Alternatives([], [], [])
    assert len(others) == len(PROMPT) - 1
    # Position i + 1 is what a greedy row would draw after i + 1 tokens of the prompt.
    for at, each in enumerate(others, start=1):
        assert each.ids[:1] == expected_tokens(PROMPT[:at], 1)
        assert len(each.ids) == len(each.texts) == 3
        assert each.logprobs == sorted(each.logprobs, reverse=True)


def test_texts_that_cannot_be_made_end_a_prompt_only_row_alone(monkeypatch):
    engine = make_engine()
    rows = [new_row(1, PROMPT, max_new_tokens=0, prompt_logprobs=True), new_row(2, OTHER)]
    monkeypatch.setattr(TokenTexts, "columns", failing := Mock(side_effect=RuntimeError("no text")))
    outcome = engine.step(make_plan(1, [(1, 7, [1, 2]), (2, 3, [3])], new=rows))
    assert failing.called
    assert tokens_of(outcome, 1) == ([], FinishCode.ERROR)
    assert "no text" in outcome.details[1].error_text
    assert tokens_of(outcome, 2)[0] == expected_tokens(OTHER, 1)


@pytest.mark.parametrize("name", ["num_alternatives", "num_prompt_alternatives"])
def test_more_alternatives_than_there_are_tokens_end_their_row_only(name):
    engine = make_engine()
    for number, finish in ((2**31 - 1, FinishCode.ERROR), (384, FinishCode.LENGTH)):
        options = {name: number, "max_new_tokens": 1, "prompt_logprobs": True}
        rows = [new_row(1, PROMPT, **options), new_row(2, OTHER)]
        plan = make_plan(1, [(1, 7, [1, 2]), (2, 3, [3])], new=rows, drop=[2])
        outcome = engine.step(plan)
        assert tokens_of(outcome, 1)[1] == finish
        assert tokens_of(outcome, 2)[0] == expected_tokens(OTHER, 1)
        if finish == FinishCode.ERROR:
            words = "2147483647 alternatives are more than the vocabulary's 384"
            assert words in outcome.details[1].error_text


def test_a_prompt_may_fill_the_positions_when_no_token_is_asked():
    engine = make_engine()
    engine.model.max_positions = len(PROMPT)
    outcome = engine.step(
        make_plan(1, [(1, 7, [1, 2])], new=[new_row(1, PROMPT, max_new_tokens=0)])
    )
    assert outcome.finish == [FinishCode.LENGTH]


def test_a_prompt_only_row_whose_pass_fails_ends_in_words():
    engine = make_engine()
    row = new_row(1, [POISON_ID, *PROMPT], max_new_tokens=0)
    outcome = engine.step(make_plan(1, [(1, 8, [1, 2])], new=[row]))
    assert tokens_of(outcome, 1) == ([], FinishCode.ERROR)


def test_a_model_is_told_on_the_host_of_which_tokens_logits_are_asked():
    """Adapters need to know: it would have to wait for a device."""
    engine = make_engine()
    engine.model.device = torch.device("meta")
    engine.model.forward = Mock(side_effect=RuntimeError("seen"))
    with pytest.raises(DeviceBrokenError):
        engine.step(make_plan(1, [(1, 7, [1, 2])], new=[new_row(1, PROMPT)]))
    ids, positions, _, logit_rows, *_ = engine.model.forward.call_args_list[0].args
    assert ids.is_meta
    assert positions.is_meta
    assert logit_rows.tolist() == [6]
