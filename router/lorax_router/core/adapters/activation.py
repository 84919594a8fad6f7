"""Which adapters are in effect on the shards, and what follows from that for steps and orders.

An adapter takes effect with the first row that needs it. It ceases in a step, and its memory
is released once that step is acknowledged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from lorax_contract.step import BASE_ADAPTER, AdapterHandle, StepPlan
from lorax_router.core.adapters.record import Orders


class Activation:
    """Owned by the Scheduler; counts anew for each incarnation of the shards."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._active: set[AdapterHandle] = set()
        # Those that cease with the next plan; those that ceased in a step, by its number,
        # that is not acknowledged yet; orders that were not taken yet.
        self._deactivate: list[AdapterHandle] = []
        self._ceasing: deque[tuple[int, list[AdapterHandle]]] = deque()
        self._orders = Orders(epoch)

    @property
    def has_news(self) -> bool:
        """Whether some adapter is to cease."""
        return bool(self._deactivate)

    def need(self, handle: AdapterHandle, plan: StepPlan) -> None:
        """Have an adapter in effect for a row of a plan."""
        if handle != BASE_ADAPTER and handle not in self._active:
            self._active.add(handle)
            plan.activate.append(handle)

    def decided(self, orders: Orders) -> None:
        """Take what was decided about adapters: those in effect have to cease first."""
        self._orders.prepare += orders.prepare
        for handle in orders.release:
            if handle in self._active:
                self._active.remove(handle)
                self._deactivate.append(handle)
            else:
                self._orders.release.append(handle)

    def write(self, plan: StepPlan) -> None:
        """Let those that are to cease do so in a plan."""
        if self._deactivate:
            self._ceasing.append((plan.seq, self._deactivate))
            plan.deactivate, self._deactivate = self._deactivate, []

    def acknowledge(self, seq: int, inactive: Iterable[AdapterHandle]) -> None:
        """A step is done on all ranks; what it could not put into effect is not."""
        # It is on the shards all the same: the next row that needs it has it activated anew.
        self._active.difference_update(inactive)
        while self._ceasing and self._ceasing[0][0] <= seq:
            self._orders.release += self._ceasing.popleft()[1]

    def take_orders(self) -> Orders:
        """Return what is to be prepared and released beside the steps; each order once."""
        orders, self._orders = self._orders, Orders(self._epoch)
        return orders
