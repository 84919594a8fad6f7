"""Draws follow the distribution that transformers' own warpers give: a chi-square test."""

import numpy as np
import pytest
import torch
from scipy import stats
from tests.helpers.sampling import PENALTIES, SETTINGS, make_row, random_logits, reference_scores

from lorax_shard.sampling.masks import forbid

# By chance one p-value in 10,000 is below this; all draws are seeded, so none here ever is.
LEAST_P_VALUE = 1e-4
NUM_DRAWS = 2500


def chi_square_p_value(ids, probs):
    """P-value of the counts against the probabilities; rare tokens share a bin."""
    counts = np.bincount(ids, minlength=len(probs))
    assert (counts[probs == 0] == 0).all()
    expected = probs / probs.sum() * len(ids)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    used = wanted > 0
    if used.sum() == 1:
        return 1.0
    return stats.chisquare(observed[used], wanted[used]).pvalue


def draw_many(make_sampler, logits, **params):
    rows = [make_row([1, 2], [3, 3, 4], do_sample=True, seed=s, **params) for s in range(NUM_DRAWS)]
    return make_sampler(len(logits)).sample(logits.expand(NUM_DRAWS, -1), rows).ids


@pytest.fixture(scope="module")
def p_values():
    """Collects what the settings gave, and tells it at the end."""
    found = []
    yield found
    print(
        f"\nFIGURE chi-square of {NUM_DRAWS} draws with each of {len(found)} settings: "
        f"the least p-value is {min(found, default=0):.3f}"
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_of_draws_passes_a_chi_square_test(make_sampler, settings, p_values):
    logits = random_logits(1, 60, seed=12, scale=1.5)[0]
    row = make_row([1, 2], [3, 3, 4], do_sample=True, **settings)
    probs = torch.softmax(reference_scores(logits, row), dim=-1).numpy()
    p_value = chi_square_p_value(draw_many(make_sampler, logits, **settings), probs)
    p_values.append(p_value)
    assert p_value > LEAST_P_VALUE


def test_draws_under_a_mask_follow_what_it_leaves(make_sampler):
    """What a grammar forbids is minus infinity before anything else."""
    odd = np.full(2, 0xAAAAAAAA, dtype=np.uint32).view(np.int32)
    logits = random_logits(1, 60, seed=12, scale=1.5)
    scores = forbid(logits, {0: odd})
    row = make_row([1, 2], [3, 3, 4], do_sample=True, temperature=0.9, **PENALTIES)
    probs = torch.softmax(reference_scores(scores[0], row), dim=-1).numpy()
    ids = draw_many(make_sampler, scores[0], temperature=0.9, **PENALTIES)
    assert not any(token_id % 2 == 0 for token_id in ids)
    assert chi_square_p_value(ids, probs) > LEAST_P_VALUE


def test_the_chi_square_test_rejects_a_temperature_that_is_a_little_off(make_sampler):
    logits = random_logits(1, 60, seed=12, scale=1.5)[0]
    probs = torch.softmax(logits.double() / 1.2, dim=-1).numpy()
    assert chi_square_p_value(draw_many(make_sampler, logits), probs) < LEAST_P_VALUE


def test_draws_along_one_sequence_follow_the_distribution(make_sampler):
    logits = random_logits(1, 30, seed=13, scale=1.0)[0]
    rows = [make_row(range(1, 2 + n), do_sample=True, seed=5) for n in range(NUM_DRAWS)]
    ids = make_sampler(30).sample(logits.expand(NUM_DRAWS, -1), rows).ids
    assert chi_square_p_value(ids, torch.softmax(logits.double(), -1).numpy()) > LEAST_P_VALUE
