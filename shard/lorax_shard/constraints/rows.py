"""The constrained rows of rank 0: their matchers, advanced beside the steps.

    drawn ids ──accept──► matchers ──fill──► masks ──(the next draw waits for them)──► sampler
     end of a step          a thread of their own, while others compute

A row's first mask is made when it enters, from its output so far, while its prompt is
computed. A grammar was made ready before, so that this takes no time that others would notice.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lorax_contract.constraint import Constraint
from lorax_shard.constraints.matchers import Matchers
from lorax_shard.constraints.row import RowConstraint
from lorax_shard.constraints.tokens import OwnTokens

if TYPE_CHECKING:
    from llguidance import LLExecutor

# Rows that enter at the same time; compiling drops the interpreter's lock.
_NUM_ENTERING = 2
_MAX_FILLING = 8


class ConstrainedRows:
    """Owns the threads in which matchers live; called by the thread that computes steps."""

    def __init__(self, matchers: Matchers) -> None:
        self._matchers = matchers
        self._entering = ThreadPoolExecutor(_NUM_ENTERING, thread_name_prefix="grammars")
        self._filling = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor: LLExecutor | None = None

    def warm_up(self) -> None:
        """Read the base's tokens in the background, so that nobody waits for that."""
        self._entering.submit(self._matchers.warm_up)

    def prepare(self, constraint: Constraint, own: OwnTokens | None = None) -> None:
        """Compile a grammar; any thread. Raises ValidationError in words."""
        self._matchers.copied(constraint, own)

    def enter(
        self,
        constraint: Constraint,
        own: OwnTokens | None = None,
        past_ids: Iterable[int] = (),
        num_endless: float = 0,
    ) -> RowConstraint:
        """Return the constraint of a row that enters; its matcher is made beside the step."""
        row = RowConstraint(self._matchers.of(constraint, own), past_ids, num_endless)
        row.pending = self._entering.submit(row.start)
        return row

    def advance(self, rows: Sequence[RowConstraint], ids: Sequence[int]) -> None:
        """Let rows accept what was drawn and fill their next masks, beside the step."""
        pending = self._filling.submit(partial(self._advance, list(rows), list(ids)))
        for row in rows:
            row.pending = pending

    def close(self) -> None:
        """End the threads."""
        self._entering.shutdown(wait=False, cancel_futures=True)
        self._filling.shutdown(wait=False, cancel_futures=True)

    def _advance(self, rows: list[RowConstraint], ids: list[int]) -> None:
        executor = self._several()
        for row, token_id in zip(rows, ids, strict=True):
            row.note(token_id)
        executor.consume_token_par(
            [(row.matcher, token_id) for row, token_id in zip(rows, ids, strict=True)]
        )
        by_width: dict[int, list[RowConstraint]] = defaultdict(list)
        for row in rows:
            by_width[row.num_words].append(row)
        for width, members in by_width.items():
            masks = np.empty((len(members), width), dtype=np.int32)
            executor.unsafe_compute_mask_ptr(
                [(row.matcher, place) for place, row in enumerate(members)],
                masks.ctypes.data,
                4 * width,
                len(members),
            )
            for row, words in zip(members, masks, strict=True):
                row.take(words)

    def _several(self) -> LLExecutor:
        if self._executor is None:
            from llguidance import LLExecutor

            # Steps have the cores; what fills masks is small beside them.
            self._executor = LLExecutor(min(_MAX_FILLING, max(1, (os.cpu_count() or 1) // 2)))
        return self._executor
