"""Who is in the batch and in the queue: requests counted by adapter and tenant, for people who look."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lorax_contract.step import AdapterHandle
from lorax_router.core.request import RequestState, Status


class RequestGroup(NamedTuple):
    """The requests of one tenant with one adapter."""

    adapter: AdapterHandle
    tenant: str
    num_running: int
    # Preempted ones included.
    num_waiting: int
    # KV blocks that they hold; one that several share counts for each.
    num_blocks: int
    # Of prompts and outputs so far.
    num_tokens: int


def groups_of(requests: Iterable[RequestState]) -> list[RequestGroup]:
    """Return the groups, the one with most requests first: O(requests)."""
    sums: dict[tuple[AdapterHandle, str], list[int]] = {}
    for request in requests:
        counts = sums.setdefault((request.spec.adapter, request.terms.tenant), [0, 0, 0, 0])
        counts[0 if request.status is Status.RUNNING else 1] += 1
        counts[2] += len(request.blocks)
        counts[3] += request.num_tokens
    groups = [RequestGroup(*key, *counts) for key, counts in sums.items()]
    return sorted(groups, key=lambda each: (-each.num_running, -each.num_waiting, each[:2]))
