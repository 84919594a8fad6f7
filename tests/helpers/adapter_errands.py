"""What shards do for a scheduler's adapters beside its steps, by the dice."""

from __future__ import annotations

import random

from lorax_contract.step import AdapterHandle, RequestId
from lorax_router.core.adapters.table import AdapterEvent, Orders
from lorax_router.core.scheduler import Scheduler


class AdapterErrands:
    """Orders that come to their end one by one, in any order; one in ten to prepare fails.

    Args:
        draw: the dice.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        # Contents of the adapters that are prepared.
        self.prepared: dict[AdapterHandle, str] = {}
        self._orders: list[tuple[AdapterEvent, AdapterHandle, int]] = []

    def take(self, orders: Orders) -> None:
        """Be told what to do."""
        self._orders += [(AdapterEvent.PREPARED, each, orders.epoch) for each in orders.prepare]
        self._orders += [(AdapterEvent.RELEASED, each, orders.epoch) for each in orders.release]

    def end_one(self, scheduler: Scheduler, now: float) -> list[RequestId] | None:
        """Tell a scheduler how one ended; return the requests that end by it, None: none is left."""
        if not self._orders:
            return None
        event, handle, epoch = self._orders.pop(self._draw.randrange(len(self._orders)))
        if event is AdapterEvent.PREPARED and self._draw.random() < 0.1:
            event = AdapterEvent.FAILED
        if event is AdapterEvent.PREPARED:
            record = scheduler.adapters.find(handle)
            self.prepared[handle] = record.content if record is not None else ""
        return scheduler.adapter_event(handle, event, now, epoch=epoch, nbytes=2)
