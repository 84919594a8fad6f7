"""Kernels of a pass that are computed as one with those behind them.

A product whose first half of columns gates the second half: what is gated need not go through
memory, and is still in a cache of the thread that computed it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorax_shard.native import NativeFunction

_Numbers = NDArray[np.int64]


class CallFields(NamedTuple):
    """The fields of one kernel or of several: what ``PassMemory.placed`` returns, field by field."""

    constant: _Numbers
    tokens: _Numbers
    logits: _Numbers
    bases: _Numbers
    storages: _Numbers

    def at(self, fields: slice) -> CallFields:
        """Return some of them."""
        return CallFields(*(each[fields] for each in self))

    def followed_by(self, *others: CallFields) -> CallFields:
        """Return these and then the others."""
        return CallFields(*map(np.concatenate, zip(self, *others, strict=True)))

    def is_same(self, field: int, other: CallFields, of_other: int, more: int = 0) -> bool:
        """Return whether a field is that of others, less ``more``, at all sizes."""
        apart = [int(b[of_other] - a[field]) for a, b in zip(self, other, strict=True)]
        return apart == [more, 0, 0, 0, 0]


# Of PanelCall and of GatedCall.
_Y, _Y_STRIDE, _ROWS, _OUT = 4, 5, 6, 8
_GATE, _GATE_STRIDE, _UP, _UP_STRIDE, _GATED_ROWS, _WIDTH = 0, 1, 2, 3, 5, 6


def joined(
    first: NativeFunction, product: CallFields, second: NativeFunction, gated: CallFields
) -> tuple[NativeFunction, CallFields] | None:
    """Return what computes a product and then its gates, and its fields; None: they are none.

    Nobody else may read what the product writes: it is not written.
    """
    found = first.joined.get(second.name)
    if found is None:
        return None
    width = int(gated.constant[_WIDTH])
    is_one = (
        product.is_same(_Y, gated, _GATE)
        and product.is_same(_Y, gated, _UP, 4 * width)
        and product.is_same(_Y_STRIDE, gated, _GATE_STRIDE)
        and product.is_same(_Y_STRIDE, gated, _UP_STRIDE)
        and product.is_same(_ROWS, gated, _GATED_ROWS)
        and product.is_same(_OUT, gated, _WIDTH, -width)
    )
    return (found, product.followed_by(gated, _number(second.rows_address))) if is_one else None


def product_memory(product: CallFields) -> int:
    """Return which memory a product writes to."""
    return int(product.storages[_Y])


def _number(number: int) -> CallFields:
    none = np.zeros(1, dtype=np.int64)
    return CallFields(np.array([number], dtype=np.int64), none, none, none, none - 1)
