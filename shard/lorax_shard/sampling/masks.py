"""Masks on logits: what may not come next cannot be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.transfer import to_device

# Legend: S sampled rows, C masked ones of them, V vocabulary.

# A bit for each id, 32 in a word, the lowest first; what is beyond its end is forbidden.
Mask: TypeAlias = NDArray[np.int32]
# By the rows' places in the batch.
Masks: TypeAlias = Mapping[int, Mask]
NO_MASKS: Masks = MappingProxyType({})


def forbid(logits: torch.Tensor, masks: Masks) -> torch.Tensor:  # S x V
    """Return logits with minus infinity where a row's mask allows no token; they stay as they are."""
    if not masks:
        return logits
    scores = logits.clone()
    at = to_device(torch.tensor(list(masks)), logits.device)
    forbidden = ~_allowed(list(masks.values()), logits)
    scores[at] = scores[at].masked_fill_(forbidden, -torch.inf)
    return scores


def _allowed(masks: Sequence[Mask], logits: torch.Tensor) -> torch.Tensor:  # C x V bool
    """Spread bits to flags; a mask may be shorter than the logits are wide, or longer."""
    num_words = -(-logits.shape[1] // 32)
    words = np.zeros((len(masks), num_words), dtype=np.int32)
    for line, mask in zip(words, masks, strict=True):
        width = min(num_words, len(mask))
        line[:width] = mask[:width]
    octets = to_device(torch.from_numpy(words.view(np.uint8)), logits.device)
    bits = octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1
    return bits.view(len(masks), -1)[:, : logits.shape[1]].bool()
