"""Random numbers that depend on a request's seed and a position only.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011) is a counter-based generator: the number at a position is a
pure function of key and counter. No state to keep, to move with a request or to
fall out of step, so a draw is the same alone, in a batch and after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_NUM_ROUNDS = 10
_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_LOW = np.uint64(_MASK_32)
_SHIFT_32 = np.uint64(32)


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:  # 4 x N
    """Return the four 32-bit words of Philox4x32-10 for N counters (4 x N) and keys (2 x N)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_number in range(_NUM_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        round_k0 = (k0 + np.uint64(round_number * _WEYL_0)) & _LOW
        round_k1 = (k1 + np.uint64(round_number * _WEYL_1)) & _LOW
        c0, c2 = (
            (product_1 >> _SHIFT_32) ^ c1 ^ round_k0,
            (product_0 >> _SHIFT_32) ^ c3 ^ round_k1,
        )
        c1, c3 = product_1 & _LOW, product_0 & _LOW
    return np.stack([c0, c1, c2, c3])


def uniforms(
    seeds: Sequence[int], positions: Sequence[int], num_levels: int = 1
) -> NDArray[np.float64]:  # N x num_levels
    """Return numbers in [0, 1) with 53 random bits, ``num_levels`` for each (seed, position).

    A number depends on its seed, position and level only.
    """
    num_pairs = -(-num_levels // 2)  # one counter gives two numbers
    seed = _repeated(seeds, num_pairs)
    position = _repeated(positions, num_pairs)
    pair = np.tile(np.arange(num_pairs, dtype=np.uint64), len(seeds))
    counter = np.stack([position & _LOW, position >> _SHIFT_32, pair, np.zeros_like(pair)])
    words = philox(counter, np.stack([seed & _LOW, seed >> _SHIFT_32]))
    numbers = np.stack([_to_unit(words[0], words[1]), _to_unit(words[2], words[3])], axis=1)
    return numbers.reshape(len(seeds), 2 * num_pairs)[:, :num_levels]


def _repeated(values: Sequence[int], times: int) -> NDArray[np.uint64]:
    return np.repeat(np.array([value & _MASK_64 for value in values], dtype=np.uint64), times)


def _to_unit(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Put 27 bits of one word above 26 bits of another."""
    bits = (high >> np.uint64(5) << np.uint64(26)) | (low >> np.uint64(6))
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
