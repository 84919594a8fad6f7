"""All policies by name, and a small table of adapters for them."""

from __future__ import annotations

from collections.abc import Callable

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies.fair import FairShare
from lorax_router.core.policies.lorax import OldestHead
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.policies.priority import StrictPriority
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.policies.shortest import ShortestFirst

NUM_ADAPTERS = 3
POLICIES: dict[str, Callable[[AdapterTable], SchedulingPolicy]] = {
    "fcfs": lambda adapters: FirstComeFirstServed(),
    "fair": lambda adapters: FairShare(),
    "priority": lambda adapters: StrictPriority(),
    "sjf": lambda adapters: ShortestFirst(),
    "lorax": OldestHead,
}


def make_table(num_slots: int) -> AdapterTable:
    """Return a table of three adapters for one or two slots; all bytes are enough for two."""
    table = AdapterTable(max_resident=num_slots, max_bytes=6, cycle_time_s=4.0)
    for number in range(1, NUM_ADAPTERS + 1):
        table.add(AdapterHandle(number), nbytes=3)
    return table
