"""Which rows of a step have drafts, and how long: within what it may hold and what is theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from lorax_contract.step import WarmupSpec
from lorax_shard.engine.drafts import DraftPace, look_up
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.rows import IdArray

# Names up to so many tokens that may follow some, the same on all ranks.
Propose: TypeAlias = "Callable[[IdArray, int], IdArray]"


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """What may be drafted."""

    # Tokens behind the one that a row computes in any case.
    max_tokens: int
    # Rows of a step; where there are more, nothing is drafted: they fill it themselves.
    max_rows: int
    # Steps that are planned before the outcome of the first is known.
    max_depth: int


class Drafter:
    """Adds drafts to the rows of a step that compute their last known token.

    A draft is written behind the row, into what is left of the blocks that it was granted. Who plans
    the next steps does not know how much of it is kept, and grants blocks for a token each: so a
    place is left for each of these.
    """

    def __init__(self, settings: DraftSettings, propose: Propose = look_up) -> None:
        self._settings = settings
        self._propose = propose
        self._max_step_tokens = self._max_positions = 0

    def limit(self, spec: WarmupSpec) -> None:
        """Keep steps within the largest one, for which there is memory."""
        self._max_step_tokens, self._max_positions = spec.max_step_tokens, spec.max_rows

    def new_pace(self) -> DraftPace:
        """Return how a new row is drafted."""
        return DraftPace(self._settings.max_tokens)

    def added_to(self, work: list[RowWork], block_size: int) -> list[RowWork]:
        """Return the work with drafts, those with a single token first."""
        candidates = [item for item in work if _may_draft(item)]
        if not candidates or len(work) > self._settings.max_rows:
            return work
        left = min(
            self._max_step_tokens - sum(item.num_tokens for item in work),
            self._max_positions - len(work),
        )
        drafted = {}
        for item in candidates:
            work_with = self._drafted(item, left, block_size)
            left -= len(work_with.draft)
            drafted[item.row.request_id] = work_with
        work = [drafted.get(item.row.request_id, item) for item in work]
        return sorted(work, key=lambda item: item.num_computed > 1)

    def _drafted(self, item: RowWork, left: int, block_size: int) -> RowWork:
        row = item.row
        assert row.pace is not None
        place = row.num_blocks * block_size - row.num_tokens - (self._settings.max_depth - 1)
        wanted = row.num_kv_tokens - row.num_tokens
        num = min(row.pace.length(), left, place, wanted)
        return item._replace(draft=self._propose(row.token_ids, num))


def _may_draft(item: RowWork) -> bool:
    row = item.row
    return (
        row.pace is not None
        and item.num_tokens == 1
        and row.num_computed + 1 == row.num_tokens
        and not row.scores_prompt
    )
