"""Scheduling policies behind one interface: who is admitted next, and who gives way."""

from __future__ import annotations

from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies.fair import FairShare
from lorax_router.core.policies.lorax import OldestHead
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.policies.priority import StrictPriority
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.policies.shortest import ShortestFirst

__all__ = ["SchedulingPolicy", "make_policy"]


def make_policy(
    name: str,
    adapters: AdapterTable,
    *,
    waiting_served_ratio: float = 1.2,
    max_waiting_tokens: int = 20,
) -> SchedulingPolicy:
    """Return a policy by the name that ``--scheduling-policy`` gives it.

    The last two are LoRAX's, and of its policy alone.
    """
    if name == "fcfs":
        return FirstComeFirstServed()
    if name == "fair":
        return FairShare()
    if name == "priority":
        return StrictPriority()
    if name == "sjf":
        return ShortestFirst()
    if name == "lorax":
        return OldestHead(
            adapters,
            waiting_served_ratio=waiting_served_ratio,
            max_waiting_tokens=max_waiting_tokens,
        )
    raise ValueError(f"there is no scheduling policy {name!r}")
