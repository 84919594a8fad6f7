"""The constrained rows of rank 0: their matchers, advanced beside the steps.

    drawn ids ──accept──► matchers ──fill──► masks ──(the next draw waits for them)──► sampler
     end of a step          a thread of their own, while others compute

A row's first mask is made when it enters, from its output so far, while its prompt is
computed. A grammar was made ready before, so that this takes no time that others would notice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

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
    """Owns the threads in which matchers live; called by the thread that computes steps.

    Args:
        num_threads: how many fill masks at once; None: half of those that steps have.
    """

    def __init__(self, matchers: Matchers, num_threads: int | None = None) -> None:
        self._matchers = matchers
        self._entering = ThreadPoolExecutor(_NUM_ENTERING, thread_name_prefix="grammars")
        self._filling = ThreadPoolExecutor(1, thread_name_prefix="masks")
        own = min(_MAX_FILLING, max(1, torch.get_num_threads() // 2))
        self._num_threads = num_threads or own
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

    def advance(self, rows: Sequence[RowConstraint], read_ids: Callable[[], Sequence[int]]) -> None:
        """Let rows accept what was drawn, once it is read, and fill their next masks: beside steps.

        A row whose id is below 0 drew nothing.
        """
        pending = self._filling.submit(partial(self._advance, list(rows), read_ids))
        for row in rows:
            row.pending = pending

    def close(self) -> None:
        """End the threads."""
        self._entering.shutdown(wait=False, cancel_futures=True)
        self._filling.shutdown(wait=False, cancel_futures=True)

    def _advance(
        self, all_rows: list[RowConstraint], read_ids: Callable[[], Sequence[int]]
    ) -> None:
        rows = []
        for row, token_id in zip(all_rows, read_ids(), strict=True):
            if token_id >= 0:
                row.accept(token_id)
                rows.append(row)
        if self._num_threads == 1 or len(rows) == 1:
            # To hand it to another thread would take longer than to do it.
            for row in rows:
                row.fill()
            return
        by_width: dict[int, list[RowConstraint]] = defaultdict(list)
        for row in rows:
            by_width[row.num_words].append(row)
        for width, members in by_width.items():
            self._fill_together(members, width)

    def _fill_together(self, rows: list[RowConstraint], width: int) -> None:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._num_threads)
        masks = np.empty((len(rows), width), dtype=np.int32)
        targets = [(row.matcher, place) for place, row in enumerate(rows)]
        self._executor.unsafe_compute_mask_ptr(targets, masks.ctypes.data, 4 * width, len(rows))
        for row, words in zip(rows, masks, strict=True):
            row.take(words)
