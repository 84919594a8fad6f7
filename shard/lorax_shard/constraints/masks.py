"""What rows that are bound to a grammar may draw next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from lorax_shard.sampling.masks import Mask


class NextTokens(Protocol):
    """What the next token of a row may be."""

    def mask(self) -> Mask:
        """Return which tokens may come next; raises what is wrong in words."""


def masks_of(constraints: Mapping[int, NextTokens]) -> tuple[dict[int, Mask], dict[int, str]]:
    """Return the masks of rows, and why those have none whose constraint failed."""
    masks: dict[int, Mask] = {}
    errors: dict[int, str] = {}
    for index, constraint in constraints.items():
        try:
            masks[index] = constraint.mask()
        except Exception as error:  # noqa: BLE001 - it is this row's
            errors[index] = str(error)
    return masks, errors


class AnyToken:
    """Allows all tokens: the constraint of a row that only shows what a mask costs."""

    def __init__(self, vocab_size: int) -> None:
        self._words = np.full(-(-vocab_size // 32), -1, dtype=np.int32)

    def mask(self) -> Mask:
        """Return the mask that forbids nothing."""
        return self._words
