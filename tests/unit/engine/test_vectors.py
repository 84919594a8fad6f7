"""Vectors of prompts: the same alone and among others, in one chunk and in many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.helpers.toy_paged_model import (
    NAN_ID,
    POISON_ID,
    expected_tokens,
    expected_vector,
    make_engine,
    make_plan,
    new_row,
    tokens_of,
)

from lorax_contract.pooling import Pooling
from lorax_contract.step import NO_NUMBERS_CODE, FinishCode, RequestId, StepOutcome

PROMPT = [7, 9, 11, 13, 15, 17, 19]
POOLINGS = pytest.mark.parametrize("pooling", list(Pooling))


def vector_in(outcome: StepOutcome, request_id: int) -> torch.Tensor:
    raw = outcome.details[RequestId(request_id)].vector
    assert raw is not None
    return torch.from_numpy(np.frombuffer(raw, dtype="<f4").copy())


def assert_is(found: torch.Tensor, prompt: list[int], pooling: Pooling) -> None:
    torch.testing.assert_close(found, expected_vector(prompt, pooling))


@POOLINGS
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("chunks", [[7], [1, 6], [3, 1, 3], [6, 1]])
def test_a_vector_comes_with_the_end_of_its_prompt(
    pooling: Pooling, chunks: list[int], batch_invariant: bool
) -> None:
    engine = make_engine(batch_invariant=batch_invariant)
    new, blocks = [new_row(1, PROMPT, pooling=pooling)], [5, 2]
    for seq, num in enumerate(chunks, start=1):
        outcome = engine.step(make_plan(seq, [(1, num, blocks)], new=new))
        new, blocks = [], []
        if seq < len(chunks):
            assert not outcome.row_ids
    assert tokens_of(outcome, 1) == ([], FinishCode.LENGTH)
    assert outcome.details[RequestId(1)].generated_text == ""
    assert_is(vector_in(outcome, 1), PROMPT, pooling)


def test_rows_with_vectors_share_passes_with_rows_that_generate() -> None:
    engine = make_engine()
    engine.step(make_plan(1, [(1, 7, [1, 2, 3])], new=[new_row(1, PROMPT, ignore_eos=True)]))
    rows = [
        new_row(2, PROMPT[:3], pooling=Pooling.MEAN),
        new_row(3, PROMPT[1:], pooling=Pooling.LAST),
        new_row(4, PROMPT[2:], pooling=Pooling.MEAN),
    ]
    work = [(1, 1, []), (2, 3, [4]), (3, 6, [5, 6]), (4, 5, [7, 8])]
    outcome = engine.step(make_plan(2, work, new=rows))
    assert engine.model.passes[-1] == [1, 3, 6, 5]
    assert tokens_of(outcome, 1)[0] == expected_tokens(PROMPT, 2)[1:]
    assert_is(vector_in(outcome, 2), PROMPT[:3], Pooling.MEAN)
    assert_is(vector_in(outcome, 3), PROMPT[1:], Pooling.LAST)
    assert_is(vector_in(outcome, 4), PROMPT[2:], Pooling.MEAN)


@POOLINGS
def test_a_vector_without_numbers_is_an_error_of_its_own(pooling: Pooling) -> None:
    engine = make_engine()
    # Of this one no token has numbers.
    rows = [new_row(1, [NAN_ID] * 3, pooling=pooling), new_row(2, PROMPT, pooling=pooling)]
    outcome = engine.step(make_plan(1, [(1, 3, [1]), (2, 7, [2, 3])], new=rows))
    assert outcome.details[RequestId(1)].error_code == NO_NUMBERS_CODE
    assert outcome.details[RequestId(1)].vector is None
    assert_is(vector_in(outcome, 2), PROMPT, pooling)


@POOLINGS
def test_what_was_summed_outlasts_a_pass_that_another_row_made_fail(pooling: Pooling) -> None:
    engine = make_engine()
    engine.step(make_plan(1, [(1, 4, [1])], new=[new_row(1, PROMPT, pooling=pooling)]))
    poisoned = [new_row(2, [3, POISON_ID])]
    outcome = engine.step(make_plan(2, [(1, 3, [2]), (2, 2, [3])], new=poisoned))
    assert set(outcome.failed) == {1, 2}
    row = new_row(1, PROMPT, pooling=pooling)
    row = type(row)(row.spec, row.output_ids, num_cached=4)
    outcome = engine.step(make_plan(3, [(1, 3, [1, 2])], new=[row], drop=[2]))
    assert_is(vector_in(outcome, 1), PROMPT, pooling)
