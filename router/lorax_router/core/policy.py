"""Who is admitted next and who gives way: the order of requests, behind an interface."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Protocol

from lorax_contract.step import AdapterHandle
from lorax_router.core.request import RequestState

_ORDER = attrgetter("order")


class QueuePolicy(Protocol):
    """Orders the waiting requests and ranks the running ones for preemption."""

    def __len__(self) -> int:
        """Return the number of waiting requests."""

    def push(self, request: RequestState) -> None:
        """Queue a new or preempted request."""

    def remove(self, request: RequestState) -> None:
        """Take a request out of the queue; it must be there."""

    def candidates(
        self, now: float, admits: Callable[[AdapterHandle], bool]
    ) -> Iterator[RequestState]:
        """Yield waiting requests in the order in which they should be admitted.

        Only those whose adapter ``admits`` are yielded: the others delay nobody. The
        queue must not change while the iterator is in use.
        """

    def waiting_for(self, adapter: AdapterHandle) -> list[RequestState]:
        """Return the waiting requests that need an adapter."""

    def outranks(self, request: RequestState, other: RequestState) -> bool:
        """Whether ``request`` may take the memory of ``other``."""

    def victim(self, running: Iterable[RequestState]) -> RequestState:
        """Return the request that gives way first; ``running`` is not empty."""


class FirstComeFirstServed:
    """Admits in order of arrival; the latest arrival gives way first.

    A preempted request keeps its place. The oldest request is therefore never
    preempted, so some request always makes progress.
    """

    def __init__(self) -> None:
        # By adapter, each in order of arrival; no queue is empty.
        self._queues: dict[AdapterHandle, list[RequestState]] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, request: RequestState) -> None:
        """Queue by arrival: O(log n) comparisons."""
        insort(self._queues.setdefault(request.spec.adapter, []), request, key=_ORDER)
        self._num_waiting += 1

    def remove(self, request: RequestState) -> None:
        """Find by arrival and take out."""
        queue = self._queues[request.spec.adapter]
        del queue[bisect_left(queue, request.order, key=_ORDER)]
        self._num_waiting -= 1
        if not queue:
            del self._queues[request.spec.adapter]

    def candidates(
        self, now: float, admits: Callable[[AdapterHandle], bool]
    ) -> Iterator[RequestState]:
        """Yield the oldest first; ``now`` does not matter here."""
        queues = [queue for adapter, queue in self._queues.items() if admits(adapter)]
        return heapq.merge(*queues, key=_ORDER)

    def waiting_for(self, adapter: AdapterHandle) -> list[RequestState]:
        """Return the adapter's queue, the oldest first."""
        return list(self._queues.get(adapter, ()))

    def outranks(self, request: RequestState, other: RequestState) -> bool:
        """Only an older request may take memory from a younger one."""
        return request.order < other.order

    def victim(self, running: Iterable[RequestState]) -> RequestState:
        """Return the youngest."""
        return max(running, key=_ORDER)
