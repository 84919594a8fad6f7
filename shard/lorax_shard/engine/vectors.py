"""Vectors of prompts: which tokens of a pass they are made of, and what becomes of those.

What is made of all tokens is made as the chunks of a prompt are computed, so how it was cut changes
nothing but the order of additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lorax_contract.errors import NoNumbersError
from lorax_contract.pooling import Pooling
from lorax_contract.step import OutputKind, RequestSpec
from lorax_shard.model.interface import SEQUENCE, TOKENS, PagedModel

Projection = Callable[[torch.Tensor], torch.Tensor]


class PromptVector:
    """The vector of one row while its prompt is computed."""

    __slots__ = ("_pooled", "is_scored", "num_tokens", "pooling", "slot")

    def __init__(self, pooling: Pooling, *, is_scored: bool = False) -> None:
        self.pooling = pooling
        # Whether a head makes scores of it.
        self.is_scored = is_scored
        # That of the adapter that it is scored with.
        self.slot: int | None = None
        # Of so many tokens what the last layer gave: added up, the largest of it, or all.
        self.num_tokens = 0
        self._pooled: torch.Tensor | None = None

    @classmethod
    def of(cls, spec: RequestSpec) -> PromptVector | None:
        """Return what a request's vector will be; None: it asks for none."""
        if not spec.output.pools:
            return None
        return cls(spec.pooling, is_scored=spec.output is OutputKind.SCORES)

    @property
    def head(self) -> str:
        """The kind of the head that scores it."""
        return TOKENS if self.pooling is Pooling.EACH else SEQUENCE

    def given_to_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a head is given of some tokens' states (n x hidden), a row for each score."""
        is_mean = self.pooling is Pooling.MEAN
        return hidden.mean(dim=0, keepdim=True) if is_mean else hidden

    def take(self, hidden: torch.Tensor) -> None:
        """Add what the last layer gives for some of its tokens (n x hidden), or their scores."""
        part, before = self._pool(hidden.float()), self._pooled
        self._pooled = part if before is None else self._joined(before, part)
        self.num_tokens += len(hidden)

    def _joined(self, before: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        if self.pooling is Pooling.EACH:
            return torch.cat([before, part])
        assert not self.is_scored, "a head scores a text once"
        return torch.maximum(before, part) if self.pooling is Pooling.MAX else before + part

    def _pool(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.pooling is Pooling.EACH or self.is_scored:
            return hidden
        if self.pooling is Pooling.MAX:
            return hidden.amax(dim=0)
        if self.pooling is Pooling.WEIGHTED_MEAN:
            weights = torch.arange(1, len(hidden) + 1, device=hidden.device) + self.num_tokens
            return weights.float() @ hidden
        return hidden.sum(dim=0)

    def go_on_from(self, before: PromptVector) -> None:
        """Take over what an earlier row of the same request had computed."""
        self._pooled, self.num_tokens = before._pooled, before.num_tokens

    def read(self, num_tokens: int, projection: Projection | None = None) -> bytes:
        """Return the vector of a prompt of so many tokens, as float32.

        A ``projection`` makes it of what was pooled; vectors of tokens and scores are as they are.
        Waits for the device; NoNumbersError: some of it is no finite number.
        """
        is_one = self.is_scored and self.pooling is not Pooling.EACH
        wanted = num_tokens if self.pooling.takes_all and not is_one else 1
        assert self._pooled is not None
        assert self.num_tokens == wanted, "some of its tokens were computed elsewhere"
        divisor = 1 if self.is_scored else _divisor(self.pooling, wanted)
        vector = self._pooled if divisor == 1 else self._pooled / divisor
        if projection is not None and not self.is_scored and self.pooling is not Pooling.EACH:
            vector = projection(vector.flatten())
        values = vector.cpu().numpy()
        if not np.isfinite(values).all():
            raise NoNumbersError("the vector has values that are no finite numbers")
        return values.astype("<f4").tobytes()


def _divisor(pooling: Pooling, num_tokens: int) -> float:
    if pooling is Pooling.MEAN:
        return num_tokens
    if pooling is Pooling.MEAN_SQRT:
        return math.sqrt(num_tokens)
    # The sum of the weights 1 to n.
    return num_tokens * (num_tokens + 1) / 2 if pooling is Pooling.WEIGHTED_MEAN else 1


class VectorSpan(NamedTuple):
    """Tokens ``start`` to ``stop`` of a pass, which the vector of a row is made of."""

    vector: PromptVector
    start: int
    stop: int


def scored(
    model: PagedModel, spans: Sequence[VectorSpan], hidden: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the states of each span, or what its head makes of them; one call for each kind."""
    made = [*hidden]
    for kind in (SEQUENCE, TOKENS):
        places = [
            place
            for place, span in enumerate(spans)
            if span.vector.is_scored and span.vector.head == kind
        ]
        if not places:
            continue
        states = [spans[place].vector.given_to_head(hidden[place]) for place in places]
        scores = model.score(kind, states, [spans[place].vector.slot for place in places])
        for place, part in zip(places, scores, strict=True):
            made[place] = part
    return made


def span_of(
    vector: PromptVector, offset: int, num_computed: int, num_tokens: int, num_prompt: int
) -> VectorSpan | None:
    """Return what of a row's tokens in a pass its vector is made of; None: nothing.

    The row computes ``num_tokens`` behind ``num_computed``, from ``offset`` in the pass on.
    """
    end = num_computed + num_tokens
    if vector.pooling.takes_all:
        return VectorSpan(vector, offset, offset + num_tokens)
    if vector.pooling is Pooling.FIRST:
        return VectorSpan(vector, offset, offset + 1) if num_computed == 0 else None
    last = offset + num_tokens
    return VectorSpan(vector, last - 1, last) if end == num_prompt else None
