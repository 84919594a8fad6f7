"""The tree draw: exact chances, and the same token when logits are rounded otherwise."""

import numpy as np
import pytest
from scipy import stats

from lorax_shard.sampling.draws import uniforms
from lorax_shard.sampling.id_tree import IdTree, num_levels, to_weights


def shares_of(values):
    """Return what values make of 1, as float32."""
    return (values / values.sum()).astype(np.float32)


def draw_all(tree, vocab_size, num_draws):
    numbers = uniforms(range(num_draws), [7] * num_draws, num_levels(vocab_size)).tolist()
    return [tree.draw(row) for row in numbers]


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 200, 256, 257, 1000])
def test_tokens_come_as_often_as_their_weights_say(vocab_size):
    weights = shares_of(np.random.default_rng(0).random(vocab_size))
    drawn = np.bincount(
        draw_all(IdTree(None, to_weights(weights)), vocab_size, 20_000), minlength=vocab_size
    )
    bins = np.arange(vocab_size) % 40
    observed = np.bincount(bins, drawn)
    shares = weights.astype(np.float64)
    expected = np.bincount(bins, shares) / shares.sum() * 20_000
    if len(observed) == 1:
        assert observed[0] == 20_000
    else:
        assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_leaving_other_tokens_out_moves_no_path():
    """With the mass of each half unchanged, a kept token is found by the same numbers."""
    probs = np.zeros(1000, dtype=np.float32)
    probs[[3, 400, 999]] = [0.2, 0.5, 0.3]
    ids, weights = np.flatnonzero(probs), to_weights(probs)
    dense, sparse = IdTree(None, weights), IdTree(ids, weights[ids])
    assert draw_all(dense, 1000, 500) == draw_all(sparse, 1000, 500)


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_a_draw_survives_rounding_that_moves_the_edges_of_a_cdf(spread):
    """The errors that batches of other sizes make in logits: about 5e-5, independent."""
    rng = np.random.default_rng(1)
    vocab_size, num_draws = 49_152, 4_000
    logits = spread * rng.standard_normal(vocab_size)
    noisy = logits + 5e-5 * rng.standard_normal(vocab_size)
    weights, other = shares_of(np.exp(logits)), shares_of(np.exp(noisy))
    trees = [draw_all(IdTree(None, to_weights(w)), vocab_size, num_draws) for w in (weights, other)]
    tree_flips = sum(a != b for a, b in zip(*trees, strict=True))
    u = uniforms(range(num_draws), [7] * num_draws)[:, 0]
    cdfs = [np.searchsorted(np.cumsum(w) / w.sum(), u) for w in (weights, other)]
    assert tree_flips <= 2
    assert int((cdfs[0] != cdfs[1]).sum()) > 5 * tree_flips
