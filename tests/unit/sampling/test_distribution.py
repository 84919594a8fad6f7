"""One row's distribution: exact order statistics, and draws of what has a chance."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_contract.step import SamplingParams
from lorax_shard.sampling.distribution import Distribution, kth_largest, largest, warp
from lorax_shard.sampling.draws import uniforms
from lorax_shard.sampling.id_tree import num_levels

SIZES = st.sampled_from([1, 2, 15, 16, 17, 255, 256, 257, 700, 1500])


def random_values(size, seed, *, num_levels=None):
    rng = np.random.default_rng(seed)
    values = rng.random(size).astype(np.float32)
    # Few levels: many ties.
    return values if num_levels is None else np.floor(values * num_levels).astype(np.float32)


@given(SIZES, st.integers(0, 99), st.integers(1, 1600), st.sampled_from([None, 3]))
def test_kth_largest_and_largest_agree_with_a_full_sort(size, seed, k, num_levels):
    values = random_values(size, seed, num_levels=num_levels)
    ordered = sorted(range(size), key=lambda i: (-values[i], i))
    assert kth_largest(values, k) == values[ordered[min(k, size) - 1]]
    assert largest(values, k).tolist() == ordered[:k]


@given(SIZES, st.integers(0, 99), st.integers(0, 2**60))
def test_only_tokens_with_a_chance_are_drawn(size, seed, draw_seed):
    weights = random_values(size, seed)
    weights[weights < 0.3] = 0.0
    weights[size // 2] = 0.5
    weights /= weights.sum()
    distribution = Distribution(None, weights)
    numbers = uniforms([draw_seed], [0], num_levels(size))[0].tolist()
    token_id = distribution.draw(numbers)
    assert weights[token_id] > 0
    assert distribution.distance(token_id, numbers) == 0.0
    chance = distribution.probability(token_id)
    assert distribution.logprob(token_id) == pytest.approx(math.log(chance), abs=1e-6)


def test_logprob_of_a_token_that_cannot_be_drawn_is_refused():
    distribution = Distribution(None, np.array([0.0, 1.0], dtype=np.float32))
    with pytest.raises(ValueError, match="token 0 cannot be drawn"):
        distribution.logprob(0)
    assert distribution.probability(0) == 0.0
    assert distribution.distance(0, [0.5] * 8) == math.inf
    assert distribution.likeliest(5) == ([1], [0.0])


def test_top_p_fills_up_with_the_lowest_of_equal_tokens():
    probs = np.full(10, 0.1, dtype=np.float32)
    assert warp(probs, SamplingParams(do_sample=True, top_p=0.25)).ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "limits",
    [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"typical_p": 1e-9}, {"top_p": 0.0}],
)
def test_at_least_one_token_stays(limits):
    probs = random_values(1000, 3)
    probs /= probs.sum()
    kept = warp(probs, SamplingParams(do_sample=True, **limits))
    assert len(kept.ids) == 1


def test_limits_that_limit_nothing_keep_every_token():
    probs = random_values(1000, 4)
    probs /= probs.sum()
    for limits in ({"top_k": 1000}, {"top_p": 1.0}, {"typical_p": 1.0}, {"min_p": 0.0}):
        assert warp(probs, SamplingParams(do_sample=True, **limits)).ids is None
    nearly_all = warp(probs, SamplingParams(do_sample=True, top_p=1 - 2**-53))
    assert len(nearly_all.ids) >= 999
