"""Adapters that take turns: whose rows give way, and who comes and goes."""

from __future__ import annotations

from functools import partial

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.table import AdapterTable, Orders
from lorax_router.core.isolation import Isolation
from lorax_router.core.policies.displacement import LossAllowance
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.running import RunningRows

# So much of the time may be lost to adapters that take turns, before they wait for rows to end.
LOST_TO_TURNS = 0.015
# Cycles that an adapter's rows have at most from when it makes room for another.
LONGEST_DRAIN = 4


class AdapterTurns:
    """Owned by the Scheduler, whose parts it works on."""

    def __init__(
        self,
        policy: SchedulingPolicy,
        running: RunningRows,
        adapters: AdapterTable,
        isolation: Isolation,
    ) -> None:
        self._policy = policy
        self._running = running
        self._adapters = adapters
        self._isolation = isolation
        self._allowance = LossAllowance(LOST_TO_TURNS)

    def earn(self, worth: float) -> None:
        """A step computed so much."""
        self._allowance.earn(worth)

    def plan(self, now: float) -> Orders | None:
        """Make rows of overdue adapters give way, and decide who comes and goes.

        None while somebody is computed alone, or is to be: what is prepared could end the shards, too.
        """
        if self._isolation.is_due:
            return None
        for handle in self._adapters.overdue(now):
            self._end_turn(handle, now)
        orders = self._adapters.orders(
            now,
            self._policy.adapter_line,
            partial(self._policy.drained, running=self._running.requests()),
        )
        for handle in orders.prepare:
            self._policy.prepares(handle)
        return orders

    def _end_turn(self, handle: AdapterHandle, now: float) -> None:
        """Make an overdue adapter's rows give way, unless too much was lost to that of late.

        Then they may end by themselves, but not for ever.
        """
        running = self._running.requests()
        self._allowance.look(running)
        is_last = handle in self._adapters.overdue(now, LONGEST_DRAIN)
        if self._allowance.is_left() or is_last:
            for request in running:
                is_spared = request.is_suspect or self._isolation.is_alone(request)
                if request.spec.adapter == handle and not is_spared:
                    self._allowance.spend(request.num_computed)
                    self._running.preempt(request, now)
