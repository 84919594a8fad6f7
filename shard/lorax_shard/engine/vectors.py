"""Vectors of prompts: which tokens of a pass they are made of, and what becomes of those.

A mean is summed up as the chunks of its prompt are computed, so how it was cut changes nothing but
the order of additions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lorax_contract.errors import NoNumbersError
from lorax_contract.step import OutputKind, Pooling, RequestSpec


class PromptVector:
    """The vector of one row while its prompt is computed."""

    __slots__ = ("_sum", "num_tokens", "pooling")

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        # Of so many tokens what the last layer gave, added up.
        self.num_tokens = 0
        self._sum: torch.Tensor | None = None

    @classmethod
    def of(cls, spec: RequestSpec) -> PromptVector | None:
        """Return what a request's vector will be; None: it asks for none."""
        return cls(spec.pooling) if spec.output is OutputKind.VECTOR else None

    def take(self, hidden: torch.Tensor) -> None:
        """Add what the last layer gives for some of its tokens (n x hidden)."""
        added = hidden.float().sum(dim=0)
        self._sum = added if self._sum is None else self._sum + added
        self.num_tokens += len(hidden)

    def go_on_from(self, before: PromptVector) -> None:
        """Take over what an earlier row of the same request had computed."""
        self._sum, self.num_tokens = before._sum, before.num_tokens

    def read(self, num_tokens: int) -> bytes:
        """Return the vector of a prompt of so many tokens, as float32.

        Waits for the device; NoNumbersError: some of it is no finite number.
        """
        wanted = num_tokens if self.pooling is Pooling.MEAN else 1
        assert self._sum is not None
        assert self.num_tokens == wanted, "some of its tokens were computed elsewhere"
        values = (self._sum / wanted).cpu().numpy()
        if not np.isfinite(values).all():
            raise NoNumbersError("the vector has values that are no finite numbers")
        return values.astype("<f4").tobytes()


class VectorSpan(NamedTuple):
    """Tokens ``start`` to ``stop`` of a pass, which the vector of a row is made of."""

    vector: PromptVector
    start: int
    stop: int


def span_of(
    vector: PromptVector, offset: int, num_computed: int, num_tokens: int, num_prompt: int
) -> VectorSpan | None:
    """Return what of a row's tokens in a pass its vector is made of; None: nothing.

    The row computes ``num_tokens`` behind ``num_computed``, from ``offset`` in the pass on.
    """
    end = num_computed + num_tokens
    if vector.pooling is Pooling.MEAN:
        return VectorSpan(vector, offset, offset + num_tokens)
    last = offset + num_tokens
    return VectorSpan(vector, last - 1, last) if end == num_prompt else None
