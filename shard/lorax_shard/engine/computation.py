"""The first half of a step: forward passes, draws, and what rows know afterwards.

No texts are made here, and nothing waits for any: what a row's next step computes follows from
the ids alone. A row that ends by its text is computed until somebody says so, and what is
drawn of it then is nobody's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lorax_contract.step import BlockId
from lorax_shard.engine.forward import PassResult, passes, run_pass
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.launched import LaunchedPass, LaunchedStep
from lorax_shard.engine.outcome import OutcomeBuilder
from lorax_shard.engine.ranks import broken_by, share_ids
from lorax_shard.engine.row_draws import PassDraws, draw
from lorax_shard.engine.rows import ResidentBatch
from lorax_shard.engine.self_test import self_test
from lorax_shard.model.interface import PagedModel
from lorax_shard.parallel.group import RankGroup
from lorax_shard.sampling.sampled import NO_TOKEN
from lorax_shard.sampling.sampler import Sampler

if TYPE_CHECKING:
    from lorax_shard.constraints.rows import ConstrainedRows

logger = logging.getLogger(__name__)


class Computation:
    """Computes the passes of one step after another; changes the rows of ``batch``.

    Args:
        sampler: draws; None: another rank does.
        constraints: take the ids of rows that are bound to grammars; None: no row here is.
        group: the other ranks; None: there are none.
        batch_invariant: compute each row by itself, token by token.
    """

    def __init__(
        self,
        model: PagedModel,
        batch: ResidentBatch,
        sampler: Sampler | None,
        *,
        constraints: ConstrainedRows | None = None,
        group: RankGroup | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.sampler = sampler
        self._model, self._batch, self._group = model, batch, group
        self._constraints = constraints
        self._batch_invariant = batch_invariant

    def compute(self, work: list[RowWork], step: LaunchedStep) -> None:
        """Compute the work and add its passes to the step.

        DeviceBrokenError when nothing can be computed any more, GroupBrokenError when the
        ranks cannot go on together.
        """
        if not self._batch_invariant:
            for part in passes(work, self._batch):
                self._compute_group(part, step)
            return
        for item in work:
            self._compute_alone(item, step)

    def _compute_alone(self, item: RowWork, step: LaunchedStep) -> None:
        """Compute a row token by token; of a draft those that were drawn."""
        row = item.row
        for _ in range(item.num_tokens):
            if row.request_id in self._batch:
                self._compute_group([RowWork(row, 1)], step)
        num_kept = 0
        for token_id in item.draft:
            if row.request_id not in self._batch or row.token_ids[-1] != token_id:
                break
            num_kept += 1
            self._compute_group([RowWork(row, 1)], step)
        _note_draft(item, num_kept, step.out)

    def _compute_group(self, work: list[RowWork], step: LaunchedStep) -> None:
        """Compute rows in one forward pass; if it raises, in halves, so that the culprit is alone.

        KV writes are the same each time, and no row changes before all of its group
        succeeded, so that a repeated pass gives the same tokens.
        """
        if not work:
            return
        try:
            result = run_pass(self._model, self._batch, work)
            draws = None if self.sampler is None else draw(self.sampler, result)
        except Exception as error:
            if self._group is not None:
                # The others are in the middle of it; halves would be this rank's alone.
                raise broken_by(self._group, error) from error
            spare = self._batch.blocks_of(work[0].row)[-1]
            self._note_failure(work, error, step.out)
        else:
            self._book(work, result, draws, step)
            return
        # Outside the handler: its exception holds the failed pass's tensors alive.
        if len(work) == 1:
            # Its last block is its own, and it needs that no more.
            self_test(self._model, BlockId(spare), self._batch.num_blocks, self._batch.block_size)
            return
        middle = len(work) // 2
        self._compute_group(work[:middle], step)
        self._compute_group(work[middle:], step)

    def _note_failure(self, work: list[RowWork], error: Exception, out: OutcomeBuilder) -> None:
        """End a row whose pass failed though it was alone; of several it may be any."""
        first = work[0].row.request_id
        if len(work) == 1:
            logger.error("request %d: the forward pass failed", first, exc_info=error)
            out.fail(first, error, doing="the forward pass failed for this request")
            self._batch.end(first)
        else:
            name = type(error).__name__
            logger.warning("a forward pass of %d rows failed (%s); trying halves", len(work), name)

    def _book(
        self, work: list[RowWork], result: PassResult, draws: PassDraws | None, step: LaunchedStep
    ) -> None:
        """Note what rows have computed and drawn; what has nothing left to compute goes."""
        inputs = result.inputs
        for item in work:
            item.row.num_computed += item.num_tokens
        launched = LaunchedPass(inputs.drawing, inputs.ended, inputs.prompt_spans, draws)
        step.passes.append(launched)
        if inputs.drawing:
            launched.ids = self._drawn_ids(inputs.drawing, draws)
            self._append(launched, step.out)
        for row in inputs.ended:
            self._batch.end(row.request_id)

    def _drawn_ids(self, drawing: list[RowWork], draws: PassDraws | None) -> list[int]:
        """Return what rank 0 drew, on all ranks."""
        ids = [NO_TOKEN] * sum(1 + len(item.draft) for item in drawing)
        if draws is not None and draws.sampled is not None:
            ids = draws.sampled.ids
        return ids if self._group is None else share_ids(self._group, ids)

    def _append(self, launched: LaunchedPass, out: OutcomeBuilder) -> None:
        """Append to each row what it keeps of its draws; one that could not draw goes."""
        ids = launched.ids
        bound, start = [], 0
        for item in launched.drawing:
            row = item.row
            # All of its prompt is computed.
            row.scores_prompt = False
            end = start + 1 + len(item.draft)
            kept = ids[start : start + 1] if end == start + 1 else _kept(ids[start:end], item)
            start = end
            if kept[-1] == NO_TOKEN:
                self._batch.end(row.request_id)
                kept = kept[:-1]
            elif row.constraint is not None:
                bound.append((row.constraint, kept[0]))
            for token_id in kept:
                row.append(token_id)
            if len(item.draft):
                row.num_computed += max(len(kept) - 1, 0)
                _note_draft(item, len(kept) - 1, out)
        if bound and self._constraints is not None:
            # Beside the steps; the next draw waits for their masks.
            self._constraints.advance(*zip(*bound, strict=True))


def _kept(ids: list[int], item: RowWork) -> list[int]:
    """Return the draws up to the first that is not the draft's, or that is none."""
    for place, token_id in enumerate(item.draft.tolist()):
        if ids[place] != token_id:
            return ids[: place + 1]
    return ids


def _note_draft(item: RowWork, num_kept: int, out: OutcomeBuilder) -> None:
    if item.row.pace is not None and len(item.draft):
        item.row.pace.checked(len(item.draft), num_kept)
        out.outcome.num_drafted += len(item.draft)
