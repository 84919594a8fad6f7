"""Masks on logits: what a grammar forbids cannot be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from lorax_shard.constraints.row import Mask
from lorax_shard.transfer import to_device

# Legend: S sampled rows, C constrained ones of them, V vocabulary.


class NextTokens(Protocol):
    """What the next token of a row may be."""

    def mask(self) -> Mask:
        """Return which tokens may come next; raises what is wrong in words."""


def masked(
    logits: torch.Tensor,  # S x V
    constraints: Mapping[int, NextTokens],
) -> tuple[torch.Tensor, dict[int, str]]:
    """Return logits with minus infinity where a row's constraint allows no token.

    The logits stay as they are. Rows whose constraint failed are left as they are too, and
    named with the reason.
    """
    if not constraints:
        return logits, {}
    masks: dict[int, Mask] = {}
    errors: dict[int, str] = {}
    for index, constraint in constraints.items():
        try:
            masks[index] = constraint.mask()
        except Exception as error:  # noqa: BLE001 - it is this row's
            errors[index] = str(error)
    if not masks:
        return logits, errors
    scores = logits.clone()
    at = to_device(torch.tensor(list(masks)), logits.device)
    forbidden = ~_allowed(list(masks.values()), logits)
    scores[at] = scores[at].masked_fill_(forbidden, -torch.inf)
    return scores, errors


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


class AnyToken:
    """Allows all tokens: the constraint of a row that only shows what a mask costs."""

    def __init__(self, vocab_size: int) -> None:
        self._words = np.full(-(-vocab_size // 32), -1, dtype=np.int32)

    def mask(self) -> Mask:
        """Return the mask that forbids nothing."""
        return self._words
