"""Which requests are too late, or will be: looked at when there is a reason to."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush

from lorax_contract.errors import DeadlineError
from lorax_contract.step import RequestId
from lorax_router.core.admission import MAX_LOOKAHEAD
from lorax_router.core.backlog import Backlog
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.request import RequestState, Status
from lorax_router.core.running import RunningRows

# How often a request is looked at again that can still be in time: when half of what is left
# to it has passed, at most every so many seconds.
_LEAST_STEP_S = 0.05


class ComputeRate:
    """The most tokens that steps computed in a second, of late.

    It foretells the least time that a prompt takes. Small steps tell nothing about what a
    large one could do, so only those that are half full make the rate fall.

    Args:
        full: tokens of the largest step.
    """

    def __init__(self, full: int) -> None:
        self._full = full
        self._per_s = 0.0

    def step_done(self, num_tokens: int, seconds: float) -> None:
        """A step computed so much in so long."""
        if not num_tokens or seconds <= 0.0:
            return
        rate = num_tokens / seconds
        if rate >= self._per_s:
            self._per_s = rate
        elif 2 * num_tokens >= self._full:
            self._per_s = max(rate, 0.98 * self._per_s)

    def seconds_for(self, num_tokens: int) -> float:
        """Return the least time that so many tokens take; 0 while nothing is known."""
        return num_tokens / self._per_s if self._per_s else 0.0


class Deadlines:
    """Requests with a deadline, by when each is to be looked at. Owned by the Scheduler.

    Args:
        policy, running, backlog: tell what a request waits for.
        max_step_tokens: tokens of the largest step.
    """

    def __init__(
        self,
        policy: SchedulingPolicy,
        running: RunningRows,
        backlog: Backlog,
        *,
        max_step_tokens: int,
    ) -> None:
        self._policy = policy
        self._running = running
        self._backlog = backlog
        self._rate = ComputeRate(max_step_tokens)
        # When a step was booked last.
        self._booked_at = 0.0
        self._line: list[tuple[float, int, RequestState]] = []
        # Requests that ended, and why; not told yet.
        self._late: dict[RequestId, str] = {}

    @property
    def next_look(self) -> float:
        """When there is a reason to look; infinite if there is none."""
        return self._line[0][0] if self._line else math.inf

    def step_done(self, num_tokens: int, planned_at: float, now: float) -> None:
        """A step was booked; it began when it was planned, or when the one before it ended."""
        self._rate.step_done(num_tokens, now - max(planned_at, self._booked_at))
        self._booked_at = now

    def watch(self, request: RequestState, now: float) -> None:
        """Take in a new request; raises DeadlineError if it would be too late."""
        if request.terms.deadline == math.inf:
            return
        if text := self._why_late(request, now):
            raise DeadlineError(text)
        self._add(request, now)

    def look(self, now: float, end: Callable[[RequestState], None]) -> None:
        """End the requests that are too late, or that will be whatever happens."""
        while self._line and self._line[0][0] <= now:
            _, _, request = heappop(self._line)
            if request.status is Status.FINISHED:
                continue
            if text := self._why_late(request, now):
                self._late[request.request_id] = text
                end(request)
            else:
                self._add(request, now)

    def take_late(self) -> dict[RequestId, str]:
        """Return the requests that ended so, each once, and why."""
        late, self._late = self._late, {}
        return late

    def _add(self, request: RequestState, now: float) -> None:
        heappush(self._line, (self._next_look(request, now), request.order, request))

    def _why_late(self, request: RequestState, now: float) -> str:
        """Return why a request cannot be in time, in words; empty while it can."""
        left = request.terms.deadline - now
        if left <= 0.0:
            return "the time that the client gave it is over"
        if request.output_ids or request.status is Status.RUNNING:
            return ""
        needed = self._least_s(request, now)
        if needed <= left:
            return ""
        return (
            f"the client gives it {left:.3g} s more, and its first token is at least "
            f"{needed:.3g} s away; give it longer, or try again when less is waiting"
        )

    def _next_look(self, request: RequestState, now: float) -> float:
        deadline = request.terms.deadline
        if request.output_ids or request.status is Status.RUNNING:
            return deadline
        return min(deadline, now + max((deadline - now) / 2, _LEAST_STEP_S))

    def _least_s(self, request: RequestState, now: float) -> float:
        """Return the least time until a waiting request has its first token: an underestimate.

        Half of what those before it take by the rate at which its tenant's requests were
        admitted of late, less those that it may pass; then what is not in the cache, as fast
        as steps ever were of late.
        """
        seconds = 0.0
        num_ahead = self._backlog.num_ahead(request) - MAX_LOOKAHEAD
        if self._policy.keeps_order and num_ahead > 0:
            rate = self._backlog.requests_per_s(request.terms.tenant, now)
            seconds = 0.0 if rate is None else num_ahead / rate / 2
        return seconds + self._rate.seconds_for(self._running.num_to_compute(request))
