"""What is drawn for rows, and what rows ask of a draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lorax_contract.step import SamplingParams
from lorax_shard.sampling.scores import SamplerRow, is_adjusted

# Stands for the logprob of what is impossible, as JSON has no infinity.
LEAST_LOGPROB = -(2.0**100)
NO_TOKEN = -1
# Why a row gives no token.
ALL_MASKED = "every token is masked, so none can be chosen; loosen the constraints of the request"
NO_NUMBERS = (
    "the model returned logits that are no finite numbers; "
    "check the adapter's weights, or use a wider dtype"
)


class Draws(Protocol):
    """What is drawn for rows, perhaps on a device that has not come to it yet."""

    @property
    def on_device(self) -> torch.Tensor | None:  # S int64, -1 for rows that give no token
        """The ids where they were drawn; None: they are here already."""

    def fail(self, index: int, reason: str) -> None:
        """Let a row have no token."""

    def read(self) -> SampledTokens:
        """Return the tokens, once they are there; any thread."""


@dataclass(slots=True)
class SampledTokens:
    """One entry per row; a row in ``errors`` has id -1 and is to be ended. Draws that are read."""

    ids: list[int]
    logprobs: list[float]
    # The likeliest tokens, best first; None for rows that asked for none.
    alternatives: list[tuple[list[int], list[float]] | None]
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def on_device(self) -> None:
        """Nothing: they are here."""
        return None

    def fail(self, index: int, reason: str) -> None:
        """Let a row have no token."""
        self.ids[index], self.errors[index] = NO_TOKEN, reason

    def read(self) -> SampledTokens:
        """Return the tokens."""
        return self


def nothing_sampled(num_rows: int) -> SampledTokens:
    """Return what is true of rows before any is drawn, and of those that give no token."""
    return SampledTokens([NO_TOKEN] * num_rows, [LEAST_LOGPROB] * num_rows, [None] * num_rows)


def is_greedy(params: SamplingParams) -> bool:
    """Return whether the likeliest token is taken; temperature 0 means that too."""
    return not params.do_sample or params.temperature <= 0.0


def is_raw(row: SamplerRow) -> bool:
    """Return whether a row wants logprobs that are others than those it is drawn from."""
    return row.params.raw_logprobs and (is_adjusted(row) or not is_greedy(row.params))


def most_alternatives(rows: Sequence[SamplerRow]) -> int:
    """Return how many alternatives the row with most of them reports."""
    return max((row.params.num_alternatives for row in rows), default=0)
