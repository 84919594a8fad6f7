"""Queues in the order of their first requests: a round costs what it looks at, not what waits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterator
from heapq import heappop, heappush, heapreplace
from math import inf

from lorax_contract.step import AdapterHandle
from lorax_router.core.policies.queue import RequestQueue, WaitingRequests
from lorax_router.core.request import RequestState, rank_of

_Entry = tuple[float, int, RequestQueue[int]]


class OrderedQueues(WaitingRequests[int]):
    """Queues by adapter and class, and a round over the adapters that admit.

    ::

        first requests, by rank    ....... x x | x x x x x
                                           └─┬─┘ └── not looked at yet
        those behind the passed ones  ◄──────┘

    A round goes on in a queue whose head is deferred: with the request behind it, in its place.
    """

    def __init__(self) -> None:
        super().__init__()
        # Each queue by its first request; none is compared, since no two orders are equal.
        self._firsts: list[_Entry] = []
        # Of this round: who admits, the worst class, how far it is, and where it went on.
        self._adapters: Container[AdapterHandle] = ()
        self._worst = inf
        self._place = 0
        self._passed: list[_Entry] = []

    def push(self, request: RequestState, group: int) -> None:
        """Queue a request."""
        queue = self.of(request.spec.adapter).get(group)
        first = None if queue is None else queue.first()
        super().push(request, group)
        queue = self.of(request.spec.adapter)[group]
        if queue.first() is request:
            if first is not None:
                self._take_out(first)
            self._put(queue)

    def remove(self, request: RequestState, group: int) -> bool:
        """Take a request out; return whether its queue is gone with it."""
        queue = self.of(request.spec.adapter)[group]
        was_first = queue.first() is request
        is_gone = super().remove(request, group)
        if was_first:
            self._take_out(request)
            if not is_gone:
                self._put(queue)
        return is_gone

    def _put(self, queue: RequestQueue[int]) -> None:
        entry = (*rank_of(queue.first()), queue)
        place = bisect_left(self._firsts, entry)
        self._firsts.insert(place, entry)
        self._place += place < self._place

    def _take_out(self, request: RequestState) -> None:
        place = bisect_left(self._firsts, rank_of(request))
        del self._firsts[place]
        self._place -= place < self._place

    # --- a round --------------------------------------------------------------------

    def begin(self, adapters: Container[AdapterHandle]) -> None:
        """Look at the first requests of these adapters."""
        self.start_round()
        self._adapters = adapters
        self._worst = inf
        self._place = 0
        self._passed.clear()

    def head(self) -> RequestState | None:
        """Return the first in rank that this round did not defer."""
        first, passed = self._next_first(), self._next_passed()
        if first is None or passed is None:
            return first or passed
        return min(first, passed, key=rank_of)

    def _next_first(self) -> RequestState | None:
        firsts = self._firsts
        for place in range(self._place, len(firsts)):
            queue = firsts[place][2]
            if not queue.num_deferred and self._is_in(queue):
                self._place = place
                return queue.first()
        self._place = len(firsts)
        return None

    def _is_in(self, queue: RequestQueue[int]) -> bool:
        return queue.group <= self._worst and queue.adapter in self._adapters

    def _next_passed(self) -> RequestState | None:
        while self._passed:
            rank, order, queue = self._passed[0]
            head = queue.head()
            if head is None or queue.group > self._worst:
                heappop(self._passed)
            elif (rank, order) == rank_of(head):
                return head
            else:
                # Ranks only grow along a queue.
                heapreplace(self._passed, (*rank_of(head), queue))
        return None

    def defer(self, request: RequestState, group: int) -> None:
        """Go on behind a request that ``head`` named."""
        queue = self.of(request.spec.adapter)[group]
        queue.defer()
        if queue.num_deferred == 1 and (head := queue.head()) is not None:
            heappush(self._passed, (*rank_of(head), queue))

    def leave_out_worse(self, group: int) -> None:
        """Look at no worse class in this round."""
        self._worst = min(self._worst, group)

    def worse(self, group: int) -> Iterator[RequestState]:
        """Yield heads of this round whose class is worse: of each class the oldest is among them.

        Ranks are classes here.
        """
        firsts = self._firsts
        place = bisect_left(firsts, (group, inf))
        while place < len(firsts) and (rank := firsts[place][0]) <= self._worst:
            end = bisect_left(firsts, (rank, inf))
            for number in range(place, end):
                queue = firsts[number][2]
                if queue.adapter in self._adapters and (head := queue.head()) is not None:
                    yield head
                    if not queue.num_deferred:
                        break
            place = end
