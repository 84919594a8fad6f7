"""What a row reports of its prompt: the model's own logprobs, and the likeliest tokens."""

import math

import pytest
import torch
from tests.helpers.sampling import random_logits

from lorax_shard.engine.prompt_scores import prompt_scores
from lorax_shard.sampling.sampled import LEAST_LOGPROB


def test_they_are_the_log_softmax_at_the_targets():
    logits = random_logits(150, 77, seed=9)
    targets = [(7 * i) % 77 for i in range(150)]
    expected = torch.log_softmax(logits.double(), dim=-1)
    found = prompt_scores(logits, targets, 3)
    at_targets = expected[torch.arange(150), targets].tolist()
    assert found.logprobs == pytest.approx(at_targets, abs=1e-5)
    best = expected.topk(3)
    assert [ids for ids, _ in found.alternatives] == best.indices.tolist()
    for (_, logprobs), wanted in zip(found.alternatives, best.values.tolist(), strict=True):
        assert logprobs == pytest.approx(wanted, abs=1e-5)


def test_parts_are_the_bits_of_the_whole():
    logits = random_logits(150, 77, seed=9)
    targets = [(7 * i) % 77 for i in range(150)]
    parts = prompt_scores(logits[:41], targets[:41], 2)
    parts.extend(prompt_scores(logits[41:], targets[41:], 2))
    assert parts == prompt_scores(logits, targets, 2)
    assert prompt_scores(logits[:0], []).logprobs == []


def test_alternatives_cost_nothing_unless_they_are_asked_for():
    logits = random_logits(3, 5)
    assert prompt_scores(logits, [2, 1, 1]).alternatives == []


def test_logprobs_are_always_finite():
    logits = random_logits(3, 5)
    logits[0, 2] = -math.inf
    logits[1, 0] = math.nan
    found = prompt_scores(logits, [2, 1, 1], 9)
    assert found.logprobs[:2] == [LEAST_LOGPROB, LEAST_LOGPROB]
    assert -50 < found.logprobs[2] < 0
    assert [len(ids) for ids, _ in found.alternatives] == [4, 0, 5]
    assert all(math.isfinite(each) for _, values in found.alternatives for each in values)


def test_equally_likely_tokens_come_by_id_as_a_greedy_row_takes_them():
    logits = torch.zeros(1, 70)
    logits[0, [30, 40, 69]] = 2.0
    assert prompt_scores(logits, [0], 2).alternatives[0][0] == [30, 40]


@pytest.mark.parametrize("vocab_size", [5, 400, 9000])
def test_positions_without_numbers_have_no_alternatives(vocab_size):
    logits = torch.zeros(3, vocab_size)
    logits[1] = float("nan")
    found = prompt_scores(logits, [0, 1, 2], 2)
    assert found.logprobs[1] == LEAST_LOGPROB
    assert [len(ids) for ids, _ in found.alternatives] == [2, 0, 2]
