"""Steps whose passes are computed, or on their way to be, and which nobody has looked at yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_contract.step import FinishCode
from lorax_shard.engine.inputs import PromptSpan, RowWork
from lorax_shard.engine.outcome import OutcomeBuilder
from lorax_shard.engine.row_draws import PassDraws
from lorax_shard.engine.rows import Row


@dataclass(slots=True)
class LaunchedPass:
    """One forward pass and what was drawn from it."""

    # Rows that drew, with the drafts that were checked.
    drawing: list[RowWork]
    # Rows of which nothing is asked beyond the prompt, which is computed now.
    ended: list[Row]
    prompt_spans: list[PromptSpan]
    # None: another rank draws.
    draws: PassDraws | None
    # What was drawn at each position of the rows that draw, one row after the other.
    ids: list[int] = field(default_factory=list)
    # Of each drawing row, once it is collected: tokens that are told, and how it ends.
    num_told: list[int] = field(default_factory=list)
    finishes: list[FinishCode] = field(default_factory=list)


@dataclass(slots=True)
class LaunchedStep:
    """A step between its launch and its outcome."""

    out: OutcomeBuilder
    passes: list[LaunchedPass] = field(default_factory=list)
