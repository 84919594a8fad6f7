"""Rows written together, most of them by a few look-ups, against each token written by itself."""

from __future__ import annotations

import copy
import functools
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers import tiny_tokenizers

from lorax_contract.step import (
    FinishCode,
    NewRow,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StoppingParams,
)
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.engine.drafts import NO_DRAFT
from lorax_shard.engine.emitter import Emitter
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.outcome import OutcomeBuilder, TokenTexts
from lorax_shard.engine.output import RowOutput
from lorax_shard.engine.prompt_scores import PromptScores
from lorax_shard.engine.rows import make_row
from lorax_shard.sampling.sampled import SampledTokens
from lorax_shard.vocabulary import vocabulary_of

RUNNING, ERROR = FinishCode.RUNNING, FinishCode.ERROR
PROMPT = "the né"


class NothingPlain:
    """A reader of which nothing is known without asking it."""

    plain_texts: dict[int, str] = {}

    def __init__(self, reader) -> None:
        self.piece, self.is_special = reader.piece, reader.is_special


@functools.cache
def readers(make) -> list[Any]:
    """Return the base's reader, and one of an adapter with other tokens behind the base's."""
    base = make()
    own = copy.deepcopy(base)
    own.add_tokens(["<tool>", "né7"])
    own.add_special_tokens(["<|own|>"])
    detokenizer = Detokenizer(base)
    return [detokenizer, detokenizer.with_tokens(vocabulary_of(own))]


class Case:
    """A row as it is emitted, and its output as it is when nothing is taken as plain."""

    def __init__(self, request_id: int, reader, stopping: StoppingParams, eos, prompt_ids) -> None:
        spec = RequestSpec(
            request_id=request_id, prompt_ids=prompt_ids, sampling=SamplingParams(),
            stopping=stopping,
        )  # fmt: skip
        self.row = make_row(NewRow(spec, ()), vocab_size=1000)
        self.row.adapter = SimpleNamespace(reader=reader)
        self.row.make_output = partial(RowOutput, reader, prompt_ids, stopping, eos)
        self.texts = TokenTexts(reader)
        self.reference = RowOutput(NothingPlain(reader), prompt_ids, stopping, eos)
        self.finish = RUNNING

    def write(
        self, out: OutcomeBuilder, draft: list[int], start: int, sampled: SampledTokens
    ) -> int:
        """Write the row's tokens one by one; return how many are kept."""
        row = self.row
        if row.is_ended:
            self.finish = RUNNING
            return 0
        for num in range(1 + len(draft)):
            index = start + num
            if index in sampled.errors:
                out.outcome.details.pop(row.request_id, None)
                out.fail(row.request_id, ValueError(sampled.errors[index]), doing="")
                self.finish = ERROR
                return num
            emitted = self.reference.push(sampled.ids[index])
            self.finish = emitted.finish
            if self.finish != RUNNING:
                out.detail(row.request_id).generated_text = self.reference.generated_text
            if (alternatives := sampled.alternatives[index]) is not None:
                found = self.texts.alternatives(*alternatives)
                out.detail(row.request_id).alternatives.append(found)
            if (scores := row.prompt_scores) is not None:
                ids = row.token_ids.tolist()
                out.detail(row.request_id).prompt_tokens = self.texts.columns(ids, scores.logprobs)
            out.token(row.request_id, sampled.ids[index], sampled.logprobs[index], emitted)
            is_last = num == len(draft)
            if self.finish != RUNNING or is_last or sampled.ids[index] != draft[num]:
                break
        return num + 1


def same(found: StepOutcome, expected: StepOutcome) -> bool:
    """Return whether two outcomes agree, whatever words an error is told in."""
    for outcome in (found, expected):
        for detail in outcome.details.values():
            if detail.error_text is not None:
                detail.error_code = detail.error_text = "an error"
    return found == expected


def draw_stopping(data, ids: st.SearchStrategy[int]) -> StoppingParams:
    strings = st.sampled_from(["fox", "k f", "the 🙂", "🙂 ", "er", ""])
    return StoppingParams(
        max_new_tokens=data.draw(st.integers(1, 25)),
        min_new_tokens=data.draw(st.sampled_from([0, 0, 1, 3])),
        stop_sequences=tuple(data.draw(st.lists(strings, max_size=2))),
        stop_token_ids=tuple(data.draw(st.lists(ids, max_size=1))),
        ignore_eos=data.draw(st.booleans()),
    )


def draw_step(data, cases: list[Case], ids: st.SearchStrategy[int]):
    """Return the drafts of the rows, and what is drawn for them."""
    drafts, drawn = [], []
    for case in cases:
        own = data.draw(st.lists(ids, min_size=1, max_size=data.draw(st.sampled_from([1, 1, 4]))))
        draft = own[:-1]
        if draft and data.draw(st.booleans()):
            draft[data.draw(st.integers(0, len(draft) - 1))] += 1
        drafts.append(draft)
        drawn += own
        if data.draw(st.integers(0, 9)) == 0:
            case.row.prompt_scores = PromptScores([-1.0] * case.row.num_prompt_tokens)
    sampled = SampledTokens(drawn, [-0.5 - at for at in range(len(drawn))], [None] * len(drawn))
    for index in range(len(drawn)):
        kind = data.draw(st.integers(0, 29))
        if kind == 0:
            sampled.errors[index] = "no token"
        elif kind == 1:
            sampled.alternatives[index] = ([drawn[index], 7], [-0.5, -2.0])
    return drafts, sampled


@pytest.mark.parametrize("make", [tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback])
@given(data=st.data())
def test_rows_that_are_written_together_are_what_each_token_is_by_itself(make, data):
    tokenizer = make()
    size = tokenizer.get_vocab_size() + 4
    words = tokenizer.encode("the quick fox ate the 🙂 there", add_special_tokens=False).ids
    some_word = st.sampled_from(words)
    ids = st.one_of(some_word, some_word, st.integers(0, size))
    for reader in readers(make):
        # What was read once is known to be plain.
        assert all(reader.piece(token_id) is not None for token_id in words)
    prompt_ids = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    cases = []
    for request_id in range(1, data.draw(st.integers(1, 6)) + 1):
        reader = data.draw(st.sampled_from(readers(make)))
        eos = data.draw(st.sets(st.one_of(some_word, st.integers(0, 2)), max_size=2))
        # The prompt may end within a character.
        prompt = prompt_ids[: data.draw(st.integers(1, len(prompt_ids)))]
        cases.append(Case(request_id, reader, draw_stopping(data, some_word), eos, prompt))
    emitter = Emitter(readers(make)[0])
    for seq in range(data.draw(st.integers(1, 8))):
        for case in cases:
            # Rows that ended are in the steps that were under way.
            case.row.is_ended |= case.finish != RUNNING
        drafts, sampled = draw_step(data, cases, ids)
        drawing = [
            RowWork(case.row, 1, np.array(draft) if draft else NO_DRAFT)
            for case, draft in zip(cases, drafts, strict=True)
        ]
        out, expected = OutcomeBuilder(seq), OutcomeBuilder(seq)
        found = emitter.emit(drawing, sampled, out)
        kept, start = [], 0
        for case, draft in zip(cases, drafts, strict=True):
            kept.append(case.write(expected, draft, start, sampled))
            start += 1 + len(draft)
            case.row.prompt_scores = None
        assert found == (kept, [case.finish for case in cases])
        assert same(out.outcome, expected.outcome)


def test_a_row_that_is_written_twice_in_a_step_has_one_line():
    tokenizer = tiny_tokenizers.byte_level()
    reader = Detokenizer(tokenizer)
    ids = [tokenizer.token_to_id(token) for token in "abc"]
    cases = [Case(each, reader, StoppingParams(max_new_tokens=9), (), [5]) for each in (1, 2)]
    emitter, out = Emitter(reader), OutcomeBuilder(1)
    first, second = (RowWork(case.row, 1) for case in cases)
    for drawing in ([first], [first], [first, second], [second]):
        for _ in range(2):
            count = len(drawing)
            sampled = SampledTokens(ids[:count], [-1.0] * count, [None] * count)
            emitter.emit(drawing, sampled, out)
    assert out.outcome.row_ids == [1, 2, 1, 2]
    assert out.outcome.num_tokens == [5, 1, 1, 3]
    assert out.outcome.finish == [RUNNING] * 4
    assert out.outcome.tokens.special == [False] * 10


def test_a_row_whose_text_cannot_be_begun_ends_alone():
    tokenizer = tiny_tokenizers.byte_level()
    reader = Detokenizer(tokenizer)
    a = tokenizer.token_to_id("a")
    cases = [Case(each, reader, StoppingParams(max_new_tokens=9), (), [5]) for each in (1, 2, 3)]

    def no_output():
        raise RuntimeError("no text")

    cases[1].row.make_output = no_output
    out = OutcomeBuilder(1)
    drawing = [RowWork(case.row, 1) for case in cases]
    found = Emitter(reader).emit(drawing, SampledTokens([a] * 3, [-1.0] * 3, [None] * 3), out)
    assert found == ([1, 0, 1], [RUNNING, ERROR, RUNNING])
    assert (out.outcome.row_ids, out.outcome.num_tokens) == ([1, 2, 3], [1, 0, 1])
    assert "no text" in out.outcome.details[2].error_text
