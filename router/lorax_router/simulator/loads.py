"""Adapters on their way to the simulated shards."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.table import AdapterEvent, AdapterTable, Orders
from lorax_router.simulator.server import SimulatedServer

# What freeing an adapter's memory takes.
_RELEASE_S = 0.0002


class LoadLane:
    """Carries out orders: so many loads at once, the others in line; releases at once."""

    def __init__(self, server: SimulatedServer, table: AdapterTable) -> None:
        self._server = server
        self._table = table
        self._line: deque[AdapterHandle] = deque()
        self._num_loading = 0
        # What ends when, in order of time and then of its beginning.
        self._under_way: list[tuple[float, int, AdapterHandle, AdapterEvent]] = []
        self._num_begun = 0
        self.num_loads = 0

    def take(self, orders: Orders, now: float) -> None:
        """Begin what was ordered."""
        for handle in orders.release:
            self._begin(handle, AdapterEvent.RELEASED, now + _RELEASE_S)
        self._line += orders.prepare
        self._fill(now)

    def next_end(self) -> float | None:
        """Return when the next order ends."""
        return self._under_way[0][0] if self._under_way else None

    def pop(self, now: float) -> tuple[AdapterHandle, AdapterEvent]:
        """Return the order that ends now."""
        _, _, handle, event = heappop(self._under_way)
        if event is AdapterEvent.PREPARED:
            self._num_loading -= 1
            self._fill(now)
        return handle, event

    def _fill(self, now: float) -> None:
        while self._line and self._num_loading < self._server.load_concurrency:
            handle = self._line.popleft()
            self._num_loading += 1
            self.num_loads += 1
            self._begin(handle, AdapterEvent.PREPARED, now + self.seconds(handle))

    def seconds(self, handle: AdapterHandle) -> float:
        """Return how long it takes to bring an adapter, now that this begins."""
        return self._server.load_seconds(self._table[handle].nbytes)

    def _begin(self, handle: AdapterHandle, event: AdapterEvent, end: float) -> None:
        self._num_begun += 1
        heappush(self._under_way, (end, self._num_begun, handle, event))
