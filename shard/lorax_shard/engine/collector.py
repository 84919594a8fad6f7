"""The second half of a step: texts, ends, details, while the next one is computed.

    launch k ──► launch k+1 ──► launch k+2        who computes
        └──► collect k └──► collect k+1           who collects, in the same order

Of a row it touches what makes its text and its prompt's scores, which nobody else does. A row
that ends is told of in ``ended``; whoever computes lets it go when it next looks there.
"""

from __future__ import annotations

from collections import deque

from lorax_contract.step import StepOutcome
from lorax_shard.engine.emitter import Emitter
from lorax_shard.engine.launched import LaunchedPass, LaunchedStep
from lorax_shard.engine.outcome import OutcomeBuilder
from lorax_shard.engine.rows import Row


class Collector:
    """Makes outcomes of launched steps, one after the other; on rank 0.

    Args:
        emitter: makes the texts.
    """

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        # Rows that ended and were not let go yet.
        self.ended: deque[Row] = deque()

    def collect(self, step: LaunchedStep) -> StepOutcome:
        """Return the outcome of a step; a row that cannot be shown ends alone."""
        for each in step.passes:
            self._collect(each, step.out)
        return step.out.outcome

    def _collect(self, launched: LaunchedPass, out: OutcomeBuilder) -> None:
        for span, scores in zip(launched.prompt_spans, launched.prompt_scores, strict=True):
            if span.row.prompt_scores is not None:
                span.row.prompt_scores.extend(scores)
        if launched.tokens is not None:
            launched.num_told, launched.finishes = self._emitter.emit(
                launched.drawing, launched.tokens.read(), out
            )
            for item, finish in zip(launched.drawing, launched.finishes, strict=True):
                if item.row.prompt_scores is not None:
                    # Given with the first token.
                    item.row.prompt_scores = None
                if finish:
                    self._end(item.row)
        for row in launched.ended:
            self._emitter.end(row, out)

    def _end(self, row: Row) -> None:
        row.is_ended = True
        self.ended.append(row)
