"""Adapters on their way to a device: from host memory, or from the store of the fleet first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.simulator.loads import LoadLane
from lorax_router.simulator.server import SimulatedServer


@dataclass(frozen=True, slots=True)
class FleetStore:
    """Where adapters come from that a replica does not have in host memory."""

    # A request to the store, and its bytes.
    fixed_s: float = 0.1
    bytes_per_s: float = 1e9
    # Adapters that a replica keeps in host memory, those that were brought last.
    num_hosted: int = 256


class TieredLane(LoadLane):
    """Loads that take longer where the adapter is not in host memory yet."""

    def __init__(self, server: SimulatedServer, table: AdapterTable, store: FleetStore) -> None:
        super().__init__(server, table)
        self._table_of_sizes, self._store = table, store
        self.hosted: OrderedDict[AdapterHandle, None] = OrderedDict()
        self.num_fetches = 0

    def seconds(self, handle: AdapterHandle) -> float:
        """Return how long it takes, the way to host memory included."""
        seconds = super().seconds(handle)
        if handle not in self.hosted:
            self.num_fetches += 1
            nbytes = self._table_of_sizes[handle].nbytes
            seconds += self._store.fixed_s + nbytes / self._store.bytes_per_s
        self.hosted[handle] = None
        self.hosted.move_to_end(handle)
        if len(self.hosted) > self._store.num_hosted:
            self.hosted.popitem(last=False)
        return seconds
