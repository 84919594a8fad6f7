"""Spans of traced rows, as one rank computes them: of each residence its prefill and its decode.

A step is of many requests, and most are of none that is traced: so a row has spans, not a step. They
are made where steps are handed over; a step without traced rows costs one look at an empty dict.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from lorax_contract.step import FinishCode, NewRow, RequestId, StepOutcome, StepPlan
from lorax_contract.trace_ids import child_of
from lorax_contract.tracing import FinishedSpan, SpanSink, TraceContext


@dataclass(slots=True)
class _TracedRow:
    """A traced row that is resident."""

    trace: TraceContext
    # Of the span that is open: since when, and by which step.
    start_ns: int
    first_step: int
    # Tokens that it is to compute, or has drawn.
    num_tokens: int
    # Rows of the step by which it began.
    num_rows: int
    is_decoding: bool = False


class RowSpans:
    """Told of each step of a shard, by its two threads.

    Args:
        sink: takes the spans.
        rank: which of the group this is.
    """

    def __init__(self, sink: SpanSink, rank: int) -> None:
        self._sink = sink
        self._rank = rank
        self._rows: dict[RequestId, _TracedRow] = {}

    def launched(self, plan: StepPlan) -> None:
        """A step is about to be computed."""
        if self._rows:
            for request_id in plan.drop:
                self._end(request_id, plan.seq)
        for new in plan.new_rows:
            if new.spec.trace is not None:
                self._enter(new, new.spec.trace, plan)

    def collected(self, outcome: StepOutcome) -> None:
        """A step's outcome is known."""
        rows = self._rows
        if not rows:
            return
        for row_id, num, finish in zip(outcome.row_ids, outcome.num_tokens, outcome.finish):
            if (row := rows.get(row_id)) is None:
                continue
            if not row.is_decoding:
                self._begin_decode(row, outcome.seq)
            row.num_tokens += num
            if finish != FinishCode.RUNNING:
                error = "generation" if finish == FinishCode.ERROR else ""
                self._end(row_id, outcome.seq, error)
        for row_id in outcome.failed:
            self._end(row_id, outcome.seq, "pass_failed")

    def forget(self) -> None:
        """No row is resident any more, and nobody asks for those that were."""
        self._rows.clear()

    def _enter(self, new: NewRow, trace: TraceContext, plan: StepPlan) -> None:
        known = len(new.spec.prompt_ids) + len(new.output_ids)
        self._rows[new.spec.request_id] = _TracedRow(
            trace, time.time_ns(), plan.seq, known - new.num_cached, len(plan.row_ids)
        )

    def _begin_decode(self, row: _TracedRow, step: int) -> None:
        """Its first token is there: what is open was its prefill."""
        self._write(row, step, "")
        row.start_ns, row.first_step, row.num_tokens = time.time_ns(), step, 0
        row.is_decoding = True

    def _end(self, request_id: RequestId, step: int, error: str = "") -> None:
        if (row := self._rows.pop(request_id, None)) is not None:
            self._write(row, step, error)

    def _write(self, row: _TracedRow, step: int, error: str) -> None:
        span = FinishedSpan(
            name="shard decode" if row.is_decoding else "shard prefill",
            context=child_of(row.trace),
            parent=row.trace,
            start_ns=row.start_ns,
            end_ns=time.time_ns(),
            attributes={
                "lorax.rank": self._rank,
                "lorax.first_step": row.first_step,
                "lorax.last_step": step,
                "lorax.tokens": row.num_tokens,
                "lorax.first_step_rows": row.num_rows,
            },
            error=error,
        )
        self._sink.write([span])
