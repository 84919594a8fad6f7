"""A step in the making: rows are placed into it until its tokens or blocks are spent."""

from __future__ import annotations

from typing import NamedTuple

from lorax_contract.step import StepPlan
from lorax_router.core.blocks import BlockPool
from lorax_router.core.request import RequestState


class PlannedRow(NamedTuple):
    """One row of a step, as ``apply`` needs it."""

    request: RequestState
    incarnation: int
    num_tokens: int
    # Whether the row has computed all it knows then, so that the shard reports of it: a
    # token, or the end of a row that draws none.
    reports: bool


class StepBuilder:
    """A plan, the rows in it, and the budget of tokens that is left. Made by the Scheduler."""

    __slots__ = ("_block_size", "_pool", "budget", "is_stalled", "now", "plan", "rows")

    def __init__(self, seq: int, budget: int, pool: BlockPool, block_size: int, now: float) -> None:
        self.now = now
        self.plan = StepPlan(seq=seq)
        self.rows: list[PlannedRow] = []
        self.budget = budget
        # Whether a running row stood still for want of a block.
        self.is_stalled = False
        self._pool = pool
        self._block_size = block_size

    def blocks_missing(self, request: RequestState, num: int) -> int:
        """Blocks that ``num`` more tokens need beyond those the request owns (may be < 0)."""
        return -(-(request.num_scheduled + num) // self._block_size) - len(request.blocks)

    def enter(self, request: RequestState) -> None:
        """Let a request that was admitted compute what it knows, as far as the budget goes."""
        self.plan.new_rows.append(request.as_new_row())
        self.plan.new_blocks += request.blocks
        num_cached = len(request.blocks)
        self.place(request, min(self.budget, request.num_to_schedule))
        self.plan.num_new_blocks[-1] += num_cached

    def place(self, request: RequestState, num: int) -> None:
        """Let a request compute ``num`` tokens; budget and blocks for them are there."""
        plan = self.plan
        missing = self.blocks_missing(request, num)
        if missing > 0:
            taken = self._pool.take(missing)
            request.blocks += taken
            plan.new_blocks += taken
        request.num_scheduled += num
        reports = request.num_scheduled == request.num_tokens + request.num_pending
        request.num_pending += reports
        request.last_step = plan.seq
        plan.row_ids.append(request.request_id)
        plan.num_tokens.append(num)
        plan.num_new_blocks.append(max(missing, 0))
        self.rows.append(PlannedRow(request, request.incarnation, num, reports))
        self.budget -= num
