"""From rows to numbers: one ragged pass without padding.

Legend: R rows, T tokens, S logit rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lorax_shard.engine.drafts import NO_DRAFT
from lorax_shard.engine.rows import DraftedRow, IdArray, ResidentBatch, Row
from lorax_shard.engine.vectors import VectorSpan, span_of
from lorax_shard.model.interface import PassNumbers, UnreadIds


class RowWork(NamedTuple):
    """Compute the next ``num_tokens`` known tokens of a row, and behind them a draft of more.

    With a draft these are all that is known of it, and it draws.
    """

    row: Row
    num_tokens: int
    draft: IdArray = NO_DRAFT

    @property
    def num_computed(self) -> int:
        """Return how many tokens that is."""
        return self.num_tokens + len(self.draft)

    @property
    def input_ids(self) -> IdArray:
        """Return the tokens."""
        row = self.row
        return row.ids_with(self.draft)[row.num_computed : row.num_computed + self.num_computed]

    def positions(self) -> list[Row | DraftedRow]:
        """Return what draws: the row itself, then as it would be behind each token of the draft."""
        behind = [DraftedRow(self.row, self.draft, num) for num in range(1, len(self.draft) + 1)]
        return [self.row, *behind]


class PromptSpan(NamedTuple):
    """Prompt positions of one row whose logits are asked for: they predict ``targets``."""

    row: Row
    targets: IdArray


@dataclass(frozen=True, slots=True)
class PassInputs:
    """What one forward pass is given; logits come back sampled rows first, then prompt spans."""

    numbers: PassNumbers
    # Rows that draw, and what is drawn: one after the other the positions of each.
    drawing: list[RowWork]
    sampled: list[Row | DraftedRow]
    # Rows of which nothing is asked beyond the prompt, which is computed then.
    ended: list[Row]
    prompt_spans: list[PromptSpan]
    # Tokens of which vectors are made.
    vector_spans: list[VectorSpan]


def build_inputs(batch: ResidentBatch, work: list[RowWork]) -> PassInputs:
    """Lay the rows of ``work`` out for one forward pass; those of one token must come first."""
    rows = [item.row for item in work]
    lens = np.array([item.num_tokens + len(item.draft) for item in work], dtype=np.int64)  # R
    starts = np.array([row.num_computed for row in rows], dtype=np.int64)  # R
    lines = np.array([row.index for row in rows], dtype=np.int64)  # R
    offsets = np.cumsum(lens) - lens  # R
    num_single = int((lens == 1).sum())
    positions = np.arange(lens.sum()) + np.repeat(starts - offsets, lens)  # T
    context_lens = starts + lens
    width = -(-int(context_lens.max()) // batch.block_size)
    tables = batch.tables[lines, :width]  # R x width
    blocks = tables[np.repeat(np.arange(len(work)), lens), positions // batch.block_size]
    singles = np.array([row.next_id for row in rows[:num_single]], dtype=np.int64)
    completing = [
        item for item in work if item.row.num_computed + item.num_tokens == item.row.num_tokens
    ]
    drawing = [item for item in completing if item.row.draws]
    is_plain = len(drawing) == num_single == len(work)
    if is_plain and not any(row.scores_prompt for row in rows):
        # Each row computes a token and draws the next: nearly all steps.
        logit_rows, spans = offsets, list[PromptSpan]()
    else:
        logit_rows, spans = _logit_rows(work, offsets)
    numbers = PassNumbers(
        np.concatenate([singles, *(item.input_ids for item in work[num_single:])]),
        positions,
        blocks * batch.block_size + positions % batch.block_size,
        tables,
        lens.tolist(),
        context_lens.tolist(),
        num_single,
        logit_rows,
        *_slot_runs(work),
        _unread(rows[:num_single]),
        _segments(rows, positions, lens),
    )
    ended = [item.row for item in completing if not item.row.draws]
    vectors = _vector_spans(work, offsets)
    return PassInputs(numbers, drawing, _positions(drawing), ended, spans, vectors)


def _segments(rows: list[Row], positions: IdArray, lens: IdArray) -> IdArray | None:
    """Return which of two texts each token belongs to; None: no row has two."""
    if not any(row.second_start for row in rows):
        return None
    starts = [row.second_start or row.num_tokens for row in rows]
    return (positions >= np.repeat(np.array(starts, dtype=np.int64), lens)).astype(np.int64)


def _vector_spans(work: list[RowWork], offsets: IdArray) -> list[VectorSpan]:
    if not any(row.vector is not None for row, _, _ in work):
        return []
    spans = [
        span_of(row.vector, offset, row.num_computed, num_tokens, row.num_prompt_tokens)
        for (row, num_tokens, _), offset in zip(work, offsets.tolist(), strict=True)
        if row.vector is not None
    ]
    return [span for span in spans if span is not None]


def _unread(singles: list[Row]) -> UnreadIds | None:
    """Return which ids only the device knows yet: all were drawn in the pass before this one."""
    waiting = [(place, row.unread) for place, row in enumerate(singles) if row.unread is not None]
    if not waiting:
        return None
    at = np.array([place for place, _ in waiting], dtype=np.int64)
    of = np.array([unread.place for _, unread in waiting], dtype=np.int64)
    drawn = waiting[0][1].ids
    assert all(unread.ids is drawn for _, unread in waiting)
    return UnreadIds(drawn, at, of)


def _positions(drawing: list[RowWork]) -> list[Row | DraftedRow]:
    """Return what draws, one position after the other."""
    if not any(len(item.draft) for item in drawing):
        return [item.row for item in drawing]
    return [position for item in drawing for position in item.positions()]


def _slot_runs(work: list[RowWork]) -> tuple[list[int | None], list[int]]:
    """Return the slot of each run of tokens, and its length."""
    if all(row.adapter is None for row, _, _ in work):
        return [None] * len(work), [num_tokens + len(draft) for _, num_tokens, draft in work]
    slots: list[int | None] = []
    lens: list[int] = []
    for row, num_tokens, draft in work:
        num = num_tokens + len(draft)
        num_base = 0
        if row.adapter_start > row.num_computed:
            num_base = min(row.adapter_start - row.num_computed, num)
            slots.append(None)
            lens.append(num_base)
        if num_base < num:
            slots.append(None if row.adapter is None else row.adapter.slot)
            lens.append(num - num_base)
    return slots, lens


def _logit_rows(work: list[RowWork], offsets: IdArray) -> tuple[IdArray, list[PromptSpan]]:
    """Return indices into T of the asked logits, those that are drawn from first; and the spans."""
    last: list[int] = []
    parts: list[IdArray] = []
    spans: list[PromptSpan] = []
    for (row, num_tokens, draft), offset in zip(work, offsets.tolist(), strict=True):
        end = row.num_computed + num_tokens
        if row.draws and end == row.num_tokens:
            last.append(offset + num_tokens - 1)
            if len(draft):
                last.extend(range(offset + num_tokens, offset + num_tokens + len(draft)))
        if not row.scores_prompt:
            continue
        end = min(end, row.num_prompt_tokens - 1)
        if (count := end - row.num_computed) > 0:
            parts.append(np.arange(offset, offset + count))
            spans.append(PromptSpan(row, row.prompt_ids[row.num_computed + 1 : end + 1]))
    return np.concatenate([np.array(last, dtype=np.int64), *parts]), spans
