"""Draws are a published function of seed and position, and of nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorax_shard.sampling.draws import philox, uniforms

ALL_ONES = 0xFFFFFFFF


# Known answers that the authors of Philox publish with their library (Random123).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            [0, 0, 0, 0],
            [0, 0],
            [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        ),
        (
            [ALL_ONES] * 4,
            [ALL_ONES] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox(
        np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None]
    )
    assert words[:, 0].tolist() == expected


SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**40)


@given(st.lists(st.tuples(SEEDS, POSITIONS), min_size=1, max_size=40))
def test_a_draw_does_not_depend_on_its_batch(pairs):
    seeds, positions = zip(*pairs, strict=True)
    together = uniforms(seeds, positions, 5)
    assert together.shape == (len(pairs), 5)
    alone = [uniforms([seed], [position], 9)[0, :5].tolist() for seed, position in pairs]
    assert together.tolist() == alone
    assert ((together >= 0.0) & (together < 1.0)).all()


def test_all_53_bits_vary():
    bits = (uniforms(range(1000), [0] * 1000) * 2.0**53).astype(np.uint64)
    for bit in range(53):
        share = np.mean(bits >> np.uint64(bit) & np.uint64(1))
        assert 0.4 < share < 0.6, f"bit {bit}"


@pytest.mark.parametrize("along", ["seeds", "positions", "levels"])
def test_neighbouring_draws_are_uniform_and_uncorrelated(along):
    count = 20_000
    run, still = range(count), [7] * count
    if along == "levels":
        numbers = uniforms([7], [7], count)[0]
    else:
        numbers = (uniforms(run, still) if along == "seeds" else uniforms(still, run))[:, 0]
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert len(set(numbers.tolist())) == count


def test_high_bits_of_seed_and_position_count():
    numbers = uniforms([1, 1 + 2**40, 1], [5, 5, 5 + 2**33])
    assert len(set(numbers[:, 0].tolist())) == 3
