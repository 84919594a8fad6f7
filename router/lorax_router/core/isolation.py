"""Requests that were in flight whenever the shards were lost: each is computed alone, to know it.

::

    a loss ──► whoever is in flight has one more    computed beyond where it was: all is forgotten
    two    ──► it is computed alone: nothing else is in flight beside it, until it is beyond
    two losses of it alone ──► it is to blame, and ends

A loss that comes from outside hits nobody twice as a rule, so that one of them costs nothing but to
compute again, all rows together. A request that kills the shards does so four times at most, whoever it
shares steps with, and no other is blamed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lorax_contract.step import AdapterHandle, RequestId
from lorax_router.core.adapters.losses import blame_preparations, is_preparing
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.admission import Admission
from lorax_router.core.booking import StepInFlight
from lorax_router.core.request import RequestState, Status
from lorax_router.core.running import RunningRows
from lorax_router.core.step_builder import StepBuilder
from lorax_router.core.suspects import Suspects

# Losses after which a request is computed alone, and those of it alone after which it ends.
LOSSES_TOGETHER = 2
LOSSES_ALONE = 2
# One after the other while an adapter was prepared, after which nobody has it prepared any more.
LOSSES_PREPARING = 3


class ShardsLost(NamedTuple):
    """Which requests end since the shards were lost, and why."""

    # Those that are to blame for it, and would be again.
    blamed: dict[RequestId, str]
    # Those that the shards which come next can never hold.
    impossible: dict[RequestId, str]

    @property
    def ended(self) -> dict[RequestId, str]:
        """All of them."""
        return self.blamed | self.impossible


@dataclass(slots=True)
class _Struck:
    """A request that was in flight as shards were lost."""

    request: RequestState
    # How many of its tokens must be computed for it to be beyond what was in flight.
    reach: int = 0
    num_losses: int = 0
    num_alone: int = 0


class Isolation:
    """Knows who was in flight at losses, and whose turn it is to be alone. Owned by the Scheduler."""

    def __init__(
        self,
        running: RunningRows,
        adapters: AdapterTable,
        suspects: Suspects,
        depth: int,
        waiting_for: Callable[[AdapterHandle], list[RequestState]],
    ) -> None:
        self._waiting_for = waiting_for
        self._running = running
        self._adapters = adapters
        self._suspects = suspects
        # Steps that may be planned before what they compute is known.
        self._depth = depth
        self._struck: dict[RequestId, _Struck] = {}

    def __bool__(self) -> bool:
        """Whether anybody is remembered."""
        return bool(self._struck)

    def lost(self, steps: Iterable[StepInFlight], *, is_quiet: bool) -> dict[RequestId, str]:
        """The shards are lost with these steps; return who ends by that, and why, in words.

        ``is_quiet``: nothing that the scheduler does not know was done beside them.

        An adapter that was being prepared may be to blame as well: after LOSSES_PREPARING those end
        that wait for it.
        """
        records = self._adapters.in_play()
        preparing, blamed = blame_preparations(records, LOSSES_PREPARING)
        ended = {
            request.request_id: "the shards were lost each time that they prepared its adapter; it is not "
            "tried again"
            for handle in blamed
            for request in self._waiting_for(handle)
        }
        return ended | self._strike(steps, is_quiet=is_quiet and not preparing)

    def _strike(self, steps: Iterable[StepInFlight], *, is_quiet: bool) -> dict[RequestId, str]:
        """Note who was in flight; ``is_quiet``: nothing else could have ended the shards."""
        rows = {row.request.request_id: row.request for step in steps for row in step.rows}
        for request_id, request in rows.items():
            if request.status is not Status.FINISHED:
                struck = self._struck.setdefault(request_id, _Struck(request))
                scheduled = min(request.num_scheduled, request.num_kv_tokens)
                struck.reach = max(struck.reach, request.num_tokens, scheduled)
                struck.num_losses += 1
                struck.num_alone += len(rows) == 1 and is_quiet
        return {
            request_id: f"the shards were lost {each.num_losses} times while they computed this request, "
            f"{each.num_alone} times of them with no other beside it; it is not tried again"
            for request_id, each in self._struck.items()
            if each.num_alone >= LOSSES_ALONE
        }

    def acquit(self, step: StepInFlight) -> None:
        """A step was computed: whoever is beyond what was in flight is like all others."""
        if not self._struck:
            return
        for row in step.rows:
            struck = self._struck.get(row.request.request_id)
            if struck is not None and row.request.num_computed >= struck.reach:
                del self._struck[row.request.request_id]

    def forget(self, request_id: RequestId) -> None:
        """A request has ended."""
        self._struck.pop(request_id, None)

    def compose(self, builder: StepBuilder, admission: Admission, *, is_clear: bool) -> bool:
        """Compose the step of whoever is to be alone; False: others have this step.

        ``is_clear``: nothing is in flight. While somebody waits for that, a step has no rows; while
        somebody waits for blocks, nobody else is admitted.
        """
        struck = self._next()
        if struck is None:
            return False
        request = struck.request
        if request.status is Status.RUNNING:
            return self._go_on(request, builder, is_clear=is_clear)
        # The last steps are planned before it is known that it is beyond.
        reach = min(struck.reach + self._depth, request.num_kv_tokens)
        is_quiet = not any(map(is_preparing, self._adapters.in_play()))
        if not (is_quiet and admission.has_room_alone(request, reach)):
            builder.is_stalled = True
            return False
        if is_clear:
            admission.enter_alone(request, builder)
        return True

    def _go_on(self, request: RequestState, builder: StepBuilder, *, is_clear: bool) -> bool:
        """Place more of who runs alone; False: it has given way, since there are no blocks for it."""
        if request.is_suspect:
            if is_clear:
                self._suspects.place(builder)
            return True
        num = min(max(builder.chunk(request), 1), request.num_to_schedule)
        if num and not (builder.has_blocks(request, 1) or is_clear):
            return True
        if num and not builder.has_blocks(request, 1):
            self._running.preempt(request, builder.now)
            return False
        if num:
            builder.place_prompt(request, num if builder.has_blocks(request, num) else 1)
        return True

    @property
    def is_due(self) -> bool:
        """Whether somebody runs alone, or may: nothing else is to be begun then that could end the shards."""
        return self._next() is not None

    def is_alone(self, request: RequestState) -> bool:
        """Whether a request is to be alone."""
        struck = self._struck.get(request.request_id)
        return struck is not None and struck.num_losses >= LOSSES_TOGETHER

    def _next(self) -> _Struck | None:
        """Return who runs alone, or else who may enter."""
        if not self._struck:
            return None
        alone = [each for each in self._struck.values() if each.num_losses >= LOSSES_TOGETHER]
        for each in alone:
            if _runs_alone(each):
                return each
        admitting = self._adapters.admitting()
        return next((each for each in alone if each.request.spec.adapter in admitting), None)

    def check(self, in_flight: Iterable[RequestState]) -> None:
        """Raise AssertionError if somebody is in flight beside a request that is to be alone."""
        known = {each.request_id for each in in_flight}
        alone = {key for key, each in self._struck.items() if each.num_losses >= LOSSES_TOGETHER}
        if known & alone and len(known) > 1:
            raise AssertionError("a request that is to be alone has company")


def _runs_alone(struck: _Struck) -> bool:
    return struck.num_losses >= LOSSES_TOGETHER and struck.request.status is Status.RUNNING
