"""Masks on logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorax_contract.errors import GenerationError
from lorax_shard.constraints.masks import AnyToken, masks_of
from lorax_shard.sampling.masks import forbid


class Allowing:
    """Allows the ids that it is given."""

    def __init__(self, *ids: int, num_words: int = 3) -> None:
        flags = np.zeros(32 * num_words, dtype=np.uint8)
        flags[list(ids)] = 1
        self.words = np.packbits(flags, bitorder="little").view(np.int32)

    def mask(self):
        return self.words


class Failing:
    def mask(self):
        raise GenerationError("no more")


def masked(logits, constraints):
    masks, errors = masks_of(constraints)
    return forbid(logits, masks), errors


def test_only_what_is_allowed_is_left_and_the_logits_stay():
    logits = torch.randn(3, 70)
    before = logits.clone()
    scores, errors = masked(logits, {1: Allowing(0, 31, 32, 69)})
    assert errors == {}
    assert torch.equal(logits, before)
    assert torch.equal(scores[[0, 2]], before[[0, 2]])
    assert torch.isfinite(scores[1]).nonzero().flatten().tolist() == [0, 31, 32, 69]
    assert torch.equal(scores[1, [0, 31, 32, 69]], before[1, [0, 31, 32, 69]])


@pytest.mark.parametrize("num_words", [1, 2, 3, 5])
def test_a_mask_may_be_shorter_or_longer_than_the_logits(num_words):
    logits = torch.randn(1, 70)
    scores, _ = masked(logits, {0: Allowing(3, 30, num_words=num_words)})
    assert torch.isfinite(scores[0]).nonzero().flatten().tolist() == [3, 30]


def test_without_constraints_nothing_is_copied():
    logits = torch.randn(2, 10)
    assert masked(logits, {})[0] is logits


def test_a_constraint_that_failed_is_named_and_the_others_hold():
    logits = torch.randn(3, 70)
    scores, errors = masked(logits, {0: Failing(), 2: Allowing(5)})
    assert errors == {0: "no more"}
    assert torch.equal(scores[0], logits[0])
    assert torch.isfinite(scores[2]).sum() == 1


def test_any_token_forbids_none():
    logits = torch.randn(1, 70)
    assert torch.equal(masked(logits, {0: AnyToken(70)})[0], logits)
