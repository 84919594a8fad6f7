"""The next step while the one before it is computed: who decodes has a place in it already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress

from lorax_router.core.request import RequestState
from lorax_router.core.step_builder import StepBudget, StepBuilder


class PlacedAhead:
    """Rows that decode, in a step that is completed later; each may be taken out until then.

    Their blocks are granted as it is completed: whatever happens to the pool meanwhile, each gets
    the block that it would get without all this, and the same cached ones make room.

    Args:
        builder: the step, with nobody in it yet.
        decodes: its rows, in their order.
        needs_block: of each, whether its token needs a block; there are so many free ones.
    """

    __slots__ = ("_builder", "_last_steps")

    def __init__(
        self, builder: StepBuilder, decodes: Sequence[RequestState], needs_block: Sequence[bool]
    ) -> None:
        self._builder = builder
        # Where each was computed last before.
        self._last_steps = [each.last_step for each in decodes]
        builder.decode(decodes)
        builder.plan.num_new_blocks[:] = map(int, needs_block)

    def __iter__(self) -> Iterator[RequestState]:
        return (row.request for row in self._builder.rows)

    def needing_blocks(self) -> Iterator[RequestState]:
        """Yield the rows that are granted a block as the step is completed."""
        return (
            row.request for row in compress(self._builder.rows, self._builder.plan.num_new_blocks)
        )

    @property
    def num_blocks(self) -> int:
        """Blocks that are granted then."""
        return sum(self._builder.plan.num_new_blocks)

    def reporting(self) -> list[RequestState]:
        """Return the rows of which the step reports."""
        return [row.request for row in self._builder.rows if row.reports]

    def take_out(self, request: RequestState) -> None:
        """A row does not go on, as if it had never been placed; nothing happens if it was not."""
        row_ids = self._builder.plan.row_ids
        if request.request_id in row_ids:
            index = row_ids.index(request.request_id)
            self._builder.take_out(index)
            request.last_step = self._last_steps.pop(index)

    def take_back(self) -> None:
        """Nobody was placed; the step is not to be used any more."""
        for row, last_step in zip(self._builder.rows, self._last_steps, strict=True):
            request = row.request
            request.num_scheduled -= 1
            request.num_pending -= row.reports
            request.last_step = last_step

    def to_complete(self, now: float, budget: StepBudget) -> StepBuilder:
        """Return the step, to grant blocks and let others in by what is known now."""
        self._builder.go_on(now, budget)
        return self._builder
