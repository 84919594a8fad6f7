"""Which blocks steps in flight touch, by the plans alone."""

from __future__ import annotations

from collections import deque

from tests.helpers.swap_world import copies_of

from lorax_contract.step import RequestId, StepOutcome, StepPlan


class TouchedBlocks:
    """Asserts of each plan that it grants no block which a step that is not booked yet touches.

    Args:
        block_size: tokens in a block.
        num_host_blocks: in host memory.
        counts: takes up what was moved and shared.
    """

    def __init__(self, block_size: int, num_host_blocks: int, counts: dict[str, int]) -> None:
        self._block_size, self._num_host_blocks = block_size, num_host_blocks
        self._counts = counts
        # Block tables as granted; by step in flight: the blocks of each row, and who entered.
        self._tables: dict[RequestId, list[int]] = {}
        self._steps: deque[tuple[dict[RequestId, set[int]], set[RequestId]]] = deque()

    def planned(self, plan: StepPlan) -> None:
        """A plan was made."""
        touched = set().union(*(blocks for step, _ in self._steps for blocks in step.values()))
        entered = {new.spec.request_id for new in plan.new_rows}
        for request_id in [*plan.drop, *entered]:
            self._tables.pop(request_id, None)
        brought = self._note_copies(plan)
        assert not touched & brought, "a block is brought to a place that is in use"
        shared = {
            new.spec.request_id: -(-new.num_cached // self._block_size) for new in plan.new_rows
        }
        grants = iter(plan.new_blocks)
        for request_id, num_new in zip(plan.row_ids, plan.num_new_blocks, strict=True):
            table = self._tables.setdefault(request_id, [])
            blocks = [next(grants) for _ in range(num_new)]
            num_shared = shared.get(request_id, 0)
            assert not touched & set(blocks[num_shared:]), "a block is reused too early"
            self._count("shared blocks", num_shared)
            table += blocks
        self._steps.append(({row: set(self._tables[row]) for row in plan.row_ids}, entered))

    def _note_copies(self, plan: StepPlan) -> set[int]:
        """Copies stay within host memory; return the blocks of the pool that they fill."""
        copies = copies_of(plan)
        assert all(0 <= block < self._num_host_blocks for block in copies.host_blocks)
        self._count("moved out", len(copies.out))
        self._count("brought back", len(copies.brought))
        return copies.brought

    def _count(self, what: str, num: int) -> None:
        self._counts[what] = self._counts.get(what, 0) + num

    def booked(self, outcome: StepOutcome) -> None:
        """The oldest step was; those behind it touch nothing of rows whose pass failed in it."""
        self._steps.popleft()
        for request_id in outcome.failed:
            for step, entered in self._steps:
                if request_id in entered:
                    break
                step.pop(request_id, None)

    def clear(self) -> None:
        """The shards are gone, with all that was in flight."""
        self._tables.clear()
        self._steps.clear()
