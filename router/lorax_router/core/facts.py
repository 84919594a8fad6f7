"""What a scheduler tells of itself; nothing is changed by asking."""

from __future__ import annotations

from collections import deque

from lorax_contract.step import RequestId
from lorax_router.core.adapters.activation import Activation
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.backlog import Backlog
from lorax_router.core.booking import StepInFlight
from lorax_router.core.composition import StepComposer
from lorax_router.core.cost import CostFit
from lorax_router.core.groups import RequestGroup, groups_of
from lorax_router.core.isolation import Isolation
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.request import RequestState
from lorax_router.core.running import RunningRows
from lorax_router.core.stats import NO_HOST_BLOCKS, SchedulerStats
from lorax_router.core.suspects import Suspects


class SchedulerFacts:
    """The part of the Scheduler that answers, on the state that it keeps."""

    block_size: int
    max_rows: int
    depth: int
    epoch: int
    adapters: AdapterTable
    backlog: Backlog
    _policy: SchedulingPolicy
    _running: RunningRows
    _requests: dict[RequestId, RequestState]
    _in_flight: deque[StepInFlight]
    _cost: CostFit
    _composer: StepComposer
    _activation: Activation
    _suspects: Suspects
    _isolation: Isolation
    _num_steps: int
    _num_drafted: int
    _num_accepted: int

    @property
    def num_in_flight(self) -> int:
        """Plans that are not applied yet."""
        return len(self._in_flight)

    @property
    def expected_s(self) -> float | None:
        """Seconds that the oldest step in flight should take; None: that is not known yet."""
        cost, work = self._cost.cost(), self._in_flight[0].work
        return None if cost is None or work is None else cost.seconds(work)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to plan and nothing in flight."""
        has_news = self._running.drop or self._activation.has_news
        return not (self._requests or self._in_flight or has_news)

    def stats(self) -> SchedulerStats:
        """Return a snapshot for metrics."""
        pool = self._running.pool
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._policy),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free + pool.num_releasing,
            num_preemptions=self._running.num_preemptions,
            num_steps=self._num_steps,
            num_cached_blocks=pool.num_cached,
            num_entered_tokens=self._running.num_entered_tokens,
            num_cached_tokens=self._running.num_cached_tokens,
            num_drafted_tokens=self._num_drafted,
            num_accepted_tokens=self._num_accepted,
            host=self._running.tier.stats() if self._running.tier is not None else NO_HOST_BLOCKS,
            step_cost=self._cost.cost(),
            prompt_limit=self._composer.prompt_limit,
            queue_depths=dict(self.backlog.depths()),
            epoch=self.epoch,
        )

    def groups(self) -> list[RequestGroup]:
        """Return who runs and who waits, by adapter and tenant: O(requests)."""
        return groups_of(self._requests.values())

    def check(self, *, is_idle: bool = False) -> None:
        """Raise AssertionError if an invariant broke, for tests: O(requests + blocks + adapters).

        With ``is_idle`` adapters that nobody needs are left out, so that being idle costs the
        same however many are known.
        """
        self._running.check()
        if len(self._running) + len(self._policy) != len(self._requests):
            raise AssertionError("a request is neither running nor waiting, or both")
        # One of them may be computed, and not applied yet.
        if len(self._running) > self.max_rows or len(self._in_flight) > self.depth + 1:
            raise AssertionError("more rows or steps than allowed")
        awaited = [row.request for step in self._in_flight for row in step.rows if row.reports]
        granted_later: list[RequestState] = []
        if (ahead := self._running.ahead) is not None:
            awaited += ahead.reporting()
            granted_later += ahead.needing_blocks()
        for request in self._requests.values():
            num_blocks = len(request.blocks) + granted_later.count(request)
            request.check(awaited.count(request), num_blocks * self.block_size, self.block_size)
        rows = [row.request for step in self._in_flight for row in step.rows]
        self._suspects.check(rows)
        self._isolation.check(rows)
        self.backlog.check_sums(sum(not each.was_admitted for each in self._requests.values()))
        self.adapters.check(in_play_only=is_idle)
