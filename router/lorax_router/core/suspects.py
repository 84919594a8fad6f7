"""Rows of passes that failed: computed again in halves, until whoever is to blame is alone.

::

    a pass of n rows failed ──► n/2 │ n/2 ──► each half in a step of its own
                                              computed: its rows go on as all others do
                                              failed:   it is halved again
                                              failed, of one row: the shards end that row

So one row that fails whatever it is computed with costs at most 2 log2(n) passes more. What a half
computes is what its rows were to compute in the pass that failed: blocks for it are theirs already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from lorax_router.core.booking import StepInFlight
from lorax_router.core.request import RequestState, Status
from lorax_router.core.running import RunningRows
from lorax_router.core.step_builder import PlannedRow, StepBuilder


class Suspects:
    """The rows that may be to blame, in groups; each waits for a step of its own.

    They run, and hold what they have, but are in no other step. Owned by the Scheduler.
    """

    def __init__(self, running: RunningRows) -> None:
        self._running = running
        self._groups: deque[list[PlannedRow]] = deque()
        # Their steps in flight.
        self._steps: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._groups or self._steps)

    def accuse(self, rows: Sequence[PlannedRow]) -> None:
        """A pass with these rows failed. Those that gave way meanwhile are computed anew anyway."""
        suspects = []
        for row in rows:
            request = row.request
            if request.status is Status.RUNNING and request.incarnation == row.incarnation:
                request.undo_scheduled()
                suspects.append(row)
            elif request.status is Status.WAITING:
                # Of what it was to compute nothing went to host memory with it.
                self._running.forget(request)
        middle = len(suspects) // 2
        self._groups += [half for half in (suspects[:middle], suspects[middle:]) if half]

    def place(self, builder: StepBuilder) -> bool:
        """Place the group that waits longest, if the step holds nobody yet; False: none is placed."""
        if builder.rows:
            return False
        while self._groups and not builder.rows:
            for row in self._groups.popleft():
                if row.request.status is Status.RUNNING:
                    # Ended as it is, the shards know the row until it is dropped.
                    self._running.drop.append(row.request.request_id)
                    builder.enter_again(row.request, row.num_tokens)
        if builder.rows:
            self._steps.add(builder.plan.seq)
        return bool(builder.rows)

    def acquit(self, step: StepInFlight) -> None:
        """All that is left of a step was computed."""
        if step.seq in self._steps:
            self._steps.discard(step.seq)
            for row in step.rows:
                row.request.is_suspect = False

    def forget(self) -> None:
        """All that ran wait to be computed anew."""
        self._groups.clear()
        self._steps.clear()

    def check(self, in_flight: Iterable[RequestState]) -> None:
        """Raise AssertionError unless each suspect is in one group, or in one step in flight."""
        waiting = [row.request for group in self._groups for row in group]
        known = [*waiting, *(each for each in in_flight if each.is_suspect)]
        named = sorted(each.order for each in known if each.status is Status.RUNNING)
        suspects = sorted(each.order for each in self._running.requests() if each.is_suspect)
        if named != suspects:
            raise AssertionError("a suspect waits for no step of its own, or for several")
