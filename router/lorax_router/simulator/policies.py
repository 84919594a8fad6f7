"""Policies by the names that the server's flag has."""

from __future__ import annotations

from collections.abc import Callable

from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies.fair import FairShare
from lorax_router.core.policies.lorax import OldestHead
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.policies.priority import StrictPriority
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.policies.shortest import ShortestFirst

POLICIES: dict[str, Callable[[AdapterTable], SchedulingPolicy]] = {
    "fcfs": lambda table: FirstComeFirstServed(),
    "fair": lambda table: FairShare(),
    "priority": lambda table: StrictPriority(),
    "sjf": lambda table: ShortestFirst(),
    "lorax": OldestHead,
}
