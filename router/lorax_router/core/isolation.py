"""Requests that were in flight whenever the shards were lost: each is computed alone, to know it.

::

    a loss ──► whoever is in flight has one more    computed beyond where it was: all is forgotten
    two    ──► it is computed alone: nothing else is in flight beside it, until it is beyond
    two losses of it alone ──► it is to blame, and ends

A loss that comes from outside hits nobody twice as a rule, so that one of them costs nothing but to
compute again, all rows together. A request that kills the shards does so four times at most, whoever it
shares steps with, and nobody else ends by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorax_contract.step import RequestId
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.admission import Admission
from lorax_router.core.booking import StepInFlight
from lorax_router.core.request import RequestState, Status
from lorax_router.core.step_builder import StepBuilder
from lorax_router.core.suspects import Suspects

# Losses after which a request is computed alone, and those of it alone after which it ends.
LOSSES_TOGETHER = 2
LOSSES_ALONE = 2


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

    def __init__(self, adapters: AdapterTable, suspects: Suspects) -> None:
        self._adapters = adapters
        self._suspects = suspects
        self._struck: dict[RequestId, _Struck] = {}

    def lost(self, steps: Iterable[StepInFlight]) -> dict[RequestId, str]:
        """The shards are lost with these steps; return who is to blame, and why, in words."""
        rows = {row.request.request_id: row.request for step in steps for row in step.rows}
        for request_id, request in rows.items():
            if request.status is not Status.FINISHED:
                struck = self._struck.setdefault(request_id, _Struck(request))
                scheduled = min(request.num_scheduled, request.num_kv_tokens)
                struck.reach = max(struck.reach, request.num_tokens, scheduled)
                struck.num_losses += 1
                struck.num_alone += len(rows) == 1
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
        if request.status is Status.WAITING:
            if not admission.has_room_alone(request, struck.reach):
                builder.is_stalled = True
                return False
            if is_clear:
                admission.enter_alone(request, builder)
        elif request.is_suspect:
            if is_clear:
                self._suspects.place(builder)
        elif request.num_to_schedule:
            builder.place_prompt(request, max(builder.chunk(request), 1))
        return True

    def _next(self) -> _Struck | None:
        """Return who runs alone, or else who may enter."""
        if not self._struck:
            return None
        alone = [each for each in self._struck.values() if each.num_losses >= LOSSES_TOGETHER]
        for each in alone:
            if each.request.status is Status.RUNNING:
                return each
        admitting = self._adapters.admitting()
        return next((each for each in alone if each.request.spec.adapter in admitting), None)

    def check(self, in_flight: Iterable[RequestState]) -> None:
        """Raise AssertionError if somebody is in flight beside a request that is to be alone."""
        known = {each.request_id for each in in_flight}
        alone = {key for key, each in self._struck.items() if each.num_losses >= LOSSES_TOGETHER}
        if known & alone and len(known) > 1:
            raise AssertionError("a request that is to be alone has company")
