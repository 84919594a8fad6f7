"""The first half of a step: forward passes, draws, and what rows know afterwards.

No texts are made here, and nothing waits for any: what a row's next step computes follows from
the ids alone. A row that ends by its text is computed until somebody says so, and what is
drawn of it then is nobody's.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from lorax_contract.step import BlockId, RequestId
from lorax_shard.engine.forward import PassResult, passes, run_pass
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.launched import LaunchedPass, LaunchedStep
from lorax_shard.engine.outcome import OutcomeBuilder
from lorax_shard.engine.ranks import begin_sharing_ids, broken_by, fails_everywhere
from lorax_shard.engine.row_draws import PassDraws, draw
from lorax_shard.engine.rows import ResidentBatch, Row, UnreadId
from lorax_shard.engine.self_test import self_test
from lorax_shard.model.interface import PagedModel
from lorax_shard.parallel.group import RankGroup
from lorax_shard.sampling.sampled import NO_TOKEN, Draws
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
        reads_at_once: whether the ids of a pass are wanted before the next begins, for drafts.
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
        reads_at_once: bool = False,
    ) -> None:
        self.sampler = sampler
        self._model, self._batch, self._group = model, batch, group
        self._constraints = constraints
        self._batch_invariant = batch_invariant
        self._reads_at_once = reads_at_once or batch_invariant
        # Passes whose ids are still on a device, or on their way from rank 0.
        self._unread: list[LaunchedPass] = []
        # Rows that left with a failed pass and have something of their prompt, until they come back.
        self.interrupted: dict[RequestId, Row] = {}

    def compute(self, work: list[RowWork], step: LaunchedStep) -> None:
        """Compute the work and add its passes to the step.

        DeviceBrokenError when nothing can be computed any more, GroupBrokenError when the
        ranks cannot go on together.
        """
        if any(item.row.reads_ids for item in work):
            self.read()
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
        """Compute rows in one forward pass; if it raises, none of them was computed, and all leave.

        Whoever plans has them computed again, in halves, so that the culprit is alone. KV writes
        are the same each time, and no row changes before its pass succeeded: the tokens are, too.
        """
        # To read ids may have ended some: their lines in the table of blocks are others' by now.
        work = [item for item in work if item.row.index >= 0]
        if not work:
            return
        for launched in self._unread:
            if launched.shared is not None:
                launched.shared.wait()
        try:
            result = run_pass(self._model, self._batch, work)
            draws = None if self.sampler is None else draw(self.sampler, result)
        except Exception as error:
            if self._group is not None and not fails_everywhere(self._group, error):
                # The others are in the middle of it, or believe that it succeeded.
                raise broken_by(self._group, error) from error
            spare = self._batch.blocks_of(work[0].row)[-1]
            self._note_failure(work, error, step.out)
        else:
            self._book(work, result, draws, step)
            return
        # Outside the handler: its exception holds the failed pass's tensors alive.
        if len(work) == 1:
            # Its last block is its own, and it needs that no more.
            self.test_device(BlockId(spare))

    def test_device(self, spare: BlockId) -> None:
        """Compute one token alone, in a block that nobody needs; DeviceBrokenError if that fails."""
        self_test(self._model, spare, self._batch.num_blocks, self._batch.block_size)

    def _note_failure(self, work: list[RowWork], error: Exception, out: OutcomeBuilder) -> None:
        """End a row whose pass failed though it was alone; of several it may be any."""
        ids = [item.row.request_id for item in work]
        if len(work) == 1:
            logger.error("request %d: the forward pass failed", ids[0], exc_info=error)
            out.fail(ids[0], error, doing="the forward pass failed for this request")
        else:
            name = type(error).__name__
            logger.warning("a forward pass of %d rows failed (%s)", len(work), name)
            out.fail_together(ids, error)
        for item in work:
            if len(work) > 1 and item.row.gathers:
                self.interrupted[item.row.request_id] = item.row
            self._batch.end(item.row.request_id)

    def _book(
        self, work: list[RowWork], result: PassResult, draws: PassDraws | None, step: LaunchedStep
    ) -> None:
        """Note what rows have computed and drawn; what has nothing left to compute goes."""
        inputs = result.inputs
        for item in work:
            item.row.num_computed += item.num_tokens
        for span, hidden in zip(inputs.vector_spans, result.hidden, strict=True):
            span.vector.take(hidden)
        tokens, scores = draws if draws is not None else (None, [])
        launched = LaunchedPass(inputs.drawing, inputs.ended, inputs.prompt_spans, tokens, scores)
        step.passes.append(launched)
        # Those of the pass before; the device has this one to do meanwhile.
        self.read()
        if inputs.drawing:
            self._take_draws(launched, step.out)
        for row in inputs.ended:
            self._batch.end(row.request_id)

    def _take_draws(self, launched: LaunchedPass, out: OutcomeBuilder) -> None:
        """Let rows have what they drew, or know where it lies."""
        drawing = launched.drawing
        for item in drawing:
            # All of its prompt is computed.
            item.row.scores_prompt = False
        if self._group is not None:
            launched.shared = begin_sharing_ids(self._group, launched)
        late_ids = launched.late_ids
        if late_ids is not None and not self._reads_at_once:
            for place, item in enumerate(drawing):
                item.row.expect(UnreadId(late_ids, place))
            self._unread.append(launched)
        else:
            launched.ids = launched.read_ids()
            self._append(launched, out)
        self._advance_constraints(launched)

    def read(self) -> None:
        """Wait for ids that are on their way from a device, and let rows have them."""
        for launched in self._unread:
            launched.ids = launched.read_ids()
            for item, token_id in zip(launched.drawing, launched.ids, strict=True):
                item.row.learn(token_id)
                if token_id == NO_TOKEN:
                    self._end(item.row)
        self._unread.clear()

    def forget(self) -> None:
        """All rows are gone."""
        self._unread.clear()
        self.interrupted.clear()

    def _end(self, row: Row) -> None:
        if self._batch.get(row.request_id) is row:
            self._batch.end(row.request_id)

    def _advance_constraints(self, launched: LaunchedPass) -> None:
        """Let constraints take what their rows drew, beside the steps: the next draw waits for them."""
        if self._constraints is None or launched.tokens is None:
            return
        if all(item.row.constraint is None for item in launched.drawing):
            return
        # Rows that are bound have no drafts.
        bound = [
            (item.row.constraint, start)
            for item, start in zip(launched.drawing, _starts(launched.drawing), strict=True)
            if item.row.constraint is not None
        ]
        rows, places = zip(*bound, strict=True)
        self._constraints.advance(rows, partial(_ids_at, launched.tokens, places))

    def _append(self, launched: LaunchedPass, out: OutcomeBuilder) -> None:
        """Append to each row what it keeps of its draws; one that could not draw goes."""
        ids, start = launched.ids, 0
        if len(ids) == len(launched.drawing):
            # Nothing was drafted.
            for item, token_id in zip(launched.drawing, ids, strict=True):
                if token_id == NO_TOKEN:
                    self._batch.end(item.row.request_id)
                else:
                    item.row.append(token_id)
            return
        for item in launched.drawing:
            row, end = item.row, start + 1 + len(item.draft)
            kept = ids[start : start + 1] if end == start + 1 else _kept(ids[start:end], item)
            start = end
            if kept[-1] == NO_TOKEN:
                self._batch.end(row.request_id)
                kept = kept[:-1]
            for token_id in kept:
                row.append(token_id)
            if len(item.draft):
                row.num_computed += max(len(kept) - 1, 0)
                _note_draft(item, len(kept) - 1, out)


def _starts(drawing: list[RowWork]) -> list[int]:
    """Return where the draws of each row begin."""
    ends = itertools.accumulate((1 + len(item.draft) for item in drawing), initial=0)
    return list(ends)[:-1]


def _ids_at(draws: Draws, places: Sequence[int]) -> list[int]:
    ids = draws.read().ids
    return [ids[place] for place in places]


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
        out.outcome.drafted[item.row.request_id] = len(item.draft)
