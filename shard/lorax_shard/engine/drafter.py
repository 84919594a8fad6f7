"""Which rows of a step have drafts, and how long: as pays, within what it may hold and what is theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lorax_contract.step import WarmupSpec
from lorax_shard.engine.drafts import Draft, DraftPace, DraftSource, MatchCounts
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.pass_prices import PassPrices, PassTimer, Seconds

# How many times what they add drafts must spare: prices are those of one moment, chances are
# guesses, and what barely pays is hardly missed.
_MARGIN = 1.15

MakeSource: TypeAlias = "Callable[[], DraftSource]"


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """What may be drafted."""

    # Tokens behind the one that a row computes in any case.
    max_tokens: int
    # Rows of a step; where there are more, nothing is drafted.
    max_rows: int
    # Steps that are planned before the outcome of the first is known.
    max_depth: int


class Drafter:
    """Adds drafts to the rows of a step that compute their last known token.

    How many tokens is decided for all rows at once: those that are likeliest to be kept, as many as
    spare more time in later steps than they add to this one, none where that is best.

    A draft is written behind the row, into what is left of the blocks that it was granted. Who plans
    the next steps does not know how much of it is kept, and grants blocks for a token each: so a
    place is left for each of these.

    Args:
        make_source: makes what proposes the drafts of a row; None: its own text.
        prices: what passes take; None: measured at the warm-up.
    """

    def __init__(
        self,
        settings: DraftSettings,
        make_source: MakeSource | None = None,
        prices: PassPrices | None = None,
    ) -> None:
        self._settings = settings
        self._counts = MatchCounts()
        self._make_source = make_source or (lambda: DraftPace(self._counts))
        self._prices = prices
        self._is_measured = prices is None
        self._max_step_tokens = self._max_positions = 0

    def warm_up(self, spec: WarmupSpec, timer: PassTimer) -> None:
        """Keep steps within the largest one, for which there is memory, and learn what passes take."""
        self._max_step_tokens, self._max_positions = spec.max_step_tokens, spec.max_rows
        if self._is_measured:
            self._prices = timer.measure(spec, self._settings.max_tokens)

    def new_pace(self) -> DraftSource:
        """Return what proposes the drafts of a new row."""
        return self._make_source()

    def added_to(self, work: list[RowWork], block_size: int) -> list[RowWork]:
        """Return the work with drafts, those with a single token first."""
        candidates = [item for item in work if _may_draft(item)]
        if not candidates or len(work) > self._settings.max_rows:
            return work
        spared_s, added_s = self._prices_of(work, len(candidates) * self._settings.max_tokens)
        if (np.arange(len(added_s)) * spared_s <= added_s).all():
            # It would not pay if all were kept.
            return work
        proposed = [self._proposed(item, block_size) for item in candidates]
        numbers = _numbers([draft.chances for draft in proposed], spared_s, added_s)
        drafted = {
            item.row.request_id: item._replace(draft=draft.token_ids[:num])
            for item, draft, num in zip(candidates, proposed, numbers, strict=True)
        }
        work = [drafted.get(item.row.request_id, item) for item in work]
        return sorted(work, key=lambda item: item.num_computed > 1)

    def _prices_of(self, work: list[RowWork], most: int) -> tuple[float, Seconds]:
        """Return what a token spares that is kept, and what 0, 1, 2... drafted ones add."""
        assert self._prices is not None, "what passes take is known from the warm-up on"
        num_positions = sum(item.num_tokens for item in work)
        left = min(self._max_step_tokens - num_positions, self._max_positions - len(work), most)
        num_drafted = np.arange(max(left, 0) + 1)
        num_drawing = sum(item.num_tokens == 1 for item in work)
        return (
            self._prices.spared_s(num_drawing),
            _MARGIN * self._prices.added_s(num_positions, num_drafted),
        )

    def _proposed(self, item: RowWork, block_size: int) -> Draft:
        row = item.row
        assert row.pace is not None
        place = row.num_blocks * block_size - row.num_tokens - (self._settings.max_depth - 1)
        wanted = row.num_kv_tokens - row.num_tokens
        return row.pace.propose(row.token_ids, min(self._settings.max_tokens, place, wanted))


def _numbers(chances: Sequence[Sequence[float]], spared_s: float, added_s: Seconds) -> list[int]:
    """Return how many tokens of each proposal are drafted."""
    rows = np.repeat(np.arange(len(chances)), [len(of_row) for of_row in chances])
    each = np.array([chance for of_row in chances for chance in of_row])
    # The likeliest first: of a row no token is before one that it follows.
    order = np.argsort(-each, kind="stable")[: len(added_s) - 1]
    num_kept = np.concatenate([[0.0], np.cumsum(each[order])])
    num_drafted = int((num_kept * spared_s - added_s[: len(num_kept)]).argmax())
    numbers: list[int] = np.bincount(rows[order[:num_drafted]], minlength=len(chances)).tolist()
    return numbers


def _may_draft(item: RowWork) -> bool:
    row = item.row
    return (
        row.pace is not None
        and item.num_tokens == 1
        and row.num_computed + 1 == row.num_tokens
        and not row.scores_prompt
    )
