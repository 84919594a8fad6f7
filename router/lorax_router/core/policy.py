"""Who is admitted next and who gives way: the order of requests, behind an interface."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Protocol

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

    def candidates(self, now: float) -> Iterator[RequestState]:
        """Yield waiting requests in the order in which they should be admitted.

        The queue must not change while the iterator is in use.
        """

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
        self._queue: list[RequestState] = []

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, request: RequestState) -> None:
        """Queue by arrival: O(log n) comparisons."""
        insort(self._queue, request, key=_ORDER)

    def remove(self, request: RequestState) -> None:
        """Find by arrival and take out."""
        del self._queue[bisect_left(self._queue, request.order, key=_ORDER)]

    def candidates(self, now: float) -> Iterator[RequestState]:
        """Yield the oldest first; ``now`` does not matter here."""
        return iter(self._queue)

    def outranks(self, request: RequestState, other: RequestState) -> bool:
        """Only an older request may take memory from a younger one."""
        return request.order < other.order

    def victim(self, running: Iterable[RequestState]) -> RequestState:
        """Return the youngest."""
        return max(running, key=_ORDER)
