"""One row's distribution: exact order statistics, and a CDF without gaps."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_contract.step import SamplingParams
from lorax_shard.engine.distribution import Distribution, kth_largest, largest, warp

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


@given(SIZES, st.integers(0, 99), st.floats(0, 1, exclude_max=True))
def test_the_draw_lies_in_the_interval_of_the_token(size, seed, u):
    weights = random_values(size, seed)
    weights[weights < 0.3] = 0.0
    weights[size // 2] = 0.5
    distribution = Distribution(None, weights)
    token_id = distribution.draw(u)
    assert weights[token_id] > 0
    low, high = distribution.interval(token_id)
    assert low - 1e-12 <= u <= high + 1e-12
    assert distribution.logprob(token_id) == pytest.approx(math.log(high - low), abs=1e-6)


@given(SIZES, st.integers(0, 99))
def test_the_intervals_tile_the_unit_interval_in_id_order(size, seed):
    weights = random_values(size, seed) + np.float32(0.01)
    ids = np.arange(size) * 3
    distribution = Distribution(ids, weights)
    intervals = [distribution.interval(int(token_id)) for token_id in ids]
    assert intervals[0][0] == 0.0
    assert intervals[-1][1] == pytest.approx(1.0, abs=1e-12)
    for (_, high), (low, _) in itertools.pairwise(intervals):
        assert high == pytest.approx(low, abs=1e-12)
    assert distribution.interval(1) is None
    assert distribution.interval(-3) is None


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_draw_at_the_very_end_never_takes_a_token_of_weight_zero(u):
    weights = np.zeros(600, dtype=np.float32)
    weights[[100, 300]] = [1.0, 0.5]
    assert Distribution(None, weights).draw(u) in (100, 300)


def test_logprob_of_a_token_that_cannot_be_drawn_is_refused():
    distribution = Distribution(None, np.array([0.0, 1.0], dtype=np.float32))
    with pytest.raises(ValueError, match="token 0 cannot be drawn"):
        distribution.logprob(0)
    assert distribution.interval(0) is None
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
