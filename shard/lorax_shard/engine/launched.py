"""Steps whose passes are computed, or on their way to be, and which nobody has looked at yet."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from lorax_contract.step import FinishCode
from lorax_shard.engine.inputs import PromptSpan, RowWork
from lorax_shard.engine.outcome import OutcomeBuilder
from lorax_shard.engine.prompt_scores import PromptScores
from lorax_shard.engine.rows import Row
from lorax_shard.engine.same_rows import RowComparison
from lorax_shard.engine.self_test import DeviceBrokenError
from lorax_shard.parallel.arriving import Arriving
from lorax_shard.sampling.sampled import Draws, SampledTokens


@dataclass(slots=True)
class LaunchedPass:
    """One forward pass and what was drawn from it."""

    # Rows that drew, with the drafts that were checked.
    drawing: list[RowWork]
    # Rows of which nothing is asked beyond the prompt, which is computed now.
    ended: list[Row]
    prompt_spans: list[PromptSpan]
    # What was drawn, and what prompts ask for; None: another rank draws, or nothing is drawn.
    tokens: Draws | None
    prompt_scores: list[PromptScores]
    # On several ranks: what rank 0 drew, on its way to all; None: nothing is drawn.
    shared: Arriving | None = None
    # What was drawn at each position of the rows that draw, one row after the other.
    ids: list[int] = field(default_factory=list)
    # Of each drawing row, once it is collected: tokens that are told, and how it ends.
    num_told: list[int] = field(default_factory=list)
    finishes: list[FinishCode] = field(default_factory=list)

    @property
    def late_ids(self) -> torch.Tensor | None:
        """The ids where they are or will be drawn; None: they are known, or none is drawn."""
        if self.tokens is not None and self.tokens.on_device is not None:
            return self.tokens.on_device
        return None if self.shared is None else self.shared.tensor

    def read_ids(self) -> list[int]:
        """Return the ids, once they are there."""
        if self.tokens is not None:
            return read(self.tokens).ids
        return [] if self.shared is None else self.shared.read()[0]


@dataclass(slots=True)
class LaunchedStep:
    """A step between its launch and its outcome; times are those of ``perf_counter_ns``."""

    out: OutcomeBuilder
    started_ns: int = 0
    # When its passes were begun, and when they were computed.
    forward_ns: int = 0
    computed_ns: int = 0
    passes: list[LaunchedPass] = field(default_factory=list)
    # Whether all ranks compute the same rows; None: there is one rank.
    comparison: RowComparison | None = None

    def wait(self) -> None:
        """Return when a device has computed all of it; DeviceBrokenError: it never will.

        GroupBrokenError: the ranks computed different rows.
        """
        if self.comparison is not None:
            self.comparison.check()
        for tokens in [each.tokens for each in self.passes]:
            if tokens is not None and tokens.on_device is not None:
                read(tokens)
                self.computed_ns = time.perf_counter_ns()


def read(tokens: Draws) -> SampledTokens:
    """Return what was drawn, once it is there; DeviceBrokenError: it never will be."""
    try:
        return tokens.read()
    except Exception as error:
        raise DeviceBrokenError(
            f"what a device drew cannot be read: {type(error).__name__}: {error}"
        ) from error
