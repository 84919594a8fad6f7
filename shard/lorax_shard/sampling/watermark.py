"""Watermarked text: each token is drawn with a preference that the one before it seeds.

After Kirchenbauer et al., "A Watermark for Large Language Models" (2023), in the form that
LoRAX and TGI have: the previous token seeds a permutation of the vocabulary, whose first part
(``gamma`` of it) is preferred by ``delta``. Who knows the rule finds the preference in a text.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

# A prime that spreads the seeds of neighbouring ids.
_HASH_KEY = 15485863
# Lists that are remembered, at a bit a token.
_NUM_REMEMBERED = 512


class Watermark:
    """Adds the preference to logits; the same on every device.

    Args:
        gamma: share of the vocabulary that is preferred, from 0 to 1.
        delta: what is added to its logits.
    """

    def __init__(self, gamma: float = 0.5, delta: float = 2.0) -> None:
        self.gamma = gamma
        self.delta = delta
        self._packed = lru_cache(_NUM_REMEMBERED)(self._make_packed)

    def preferred(self, previous_id: int, vocab_size: int) -> NDArray[np.bool_]:
        """Return for each token whether it is preferred after ``previous_id``."""
        packed = self.packed(previous_id, vocab_size)
        return np.unpackbits(packed, count=vocab_size).view(np.bool_)

    def packed(self, previous_id: int, vocab_size: int) -> NDArray[np.uint8]:
        """Return the same as a bit for each token, the highest of a byte first."""
        return self._packed(previous_id, vocab_size)

    def _make_packed(self, previous_id: int, vocab_size: int) -> NDArray[np.uint8]:
        generator = torch.Generator().manual_seed(_HASH_KEY * previous_id)
        permutation = torch.randperm(vocab_size, generator=generator)
        mask = np.zeros(vocab_size, dtype=np.bool_)
        mask[permutation[: int(vocab_size * self.gamma)].numpy()] = True
        return np.packbits(mask)
