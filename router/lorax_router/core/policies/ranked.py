"""Policies that give each request one rank when it comes: the lowest is admitted first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from heapq import heapify, heappop, heapreplace

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.record import AdapterRecord
from lorax_router.core.policies.queue import RequestQueue, WaitingRequests
from lorax_router.core.request import RequestState, rank_of

# How many later requests may overtake one that does not fit, before all wait for it.
MAX_BYPASSES = 64


class FirstComeFirstServed:
    """Admits in order of arrival; the latest arrival gives way first.

    A preempted request keeps its place. The oldest request is therefore never
    preempted, so some request always makes progress.
    """

    reserves_all = False
    keeps_order = True
    displaces = False

    def __init__(self, *, max_bypasses: int = MAX_BYPASSES) -> None:
        self.max_bypasses = max_bypasses
        self._waiting: WaitingRequests[int] = WaitingRequests()
        # Of the queues in this round: the rank of the head when it was last looked at.
        self._round: list[tuple[float, int, RequestQueue[int]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: RequestState) -> None:
        """Queue by rank."""
        self._waiting.push(request, 0)

    def remove(self, request: RequestState) -> None:
        """Take out."""
        self._waiting.remove(request, 0)

    def start_round(self, now: float, adapters: Iterable[AdapterHandle]) -> None:
        """Look at the first of each adapter."""
        self._waiting.start_round()
        self._round = [
            (*rank_of(head), queue)
            for queue in self._waiting.of_all(adapters)
            if (head := queue.head()) is not None
        ]
        heapify(self._round)

    def head(self) -> RequestState | None:
        """Return the first in rank."""
        while self._round:
            rank, order, queue = self._round[0]
            head = queue.head()
            if head is None:
                heappop(self._round)
            elif (rank, order) == rank_of(head):
                return head
            else:
                # Ranks only grow along a queue.
                heapreplace(self._round, (*rank_of(head), queue))
        return None

    def admitted(self, request: RequestState) -> None:
        """It leaves the queue."""
        self.remove(request)

    def deferred(self, request: RequestState) -> None:
        """Go on with the one behind it."""
        self._round[0][2].defer()

    def served(self, request: RequestState, num_tokens: int) -> None:
        """Nobody counts."""

    def ended(self, request: RequestState) -> None:
        """Nobody counts."""

    def waiting_for(self, adapter: AdapterHandle) -> list[RequestState]:
        """Return the adapter's queue, the first in rank first."""
        return self._waiting.requests(adapter)

    def outranks(self, request: RequestState, other: RequestState) -> bool:
        """Only a request of better rank may take memory."""
        return rank_of(request) < rank_of(other)

    def victim(
        self,
        request: RequestState,
        outranked: Sequence[RequestState],
        running: Collection[RequestState],
    ) -> RequestState | None:
        """Return the last in rank."""
        return max(outranked, key=rank_of)

    def is_entitled(self, request: RequestState, running: Sequence[RequestState]) -> bool:
        """Nobody takes from those that run."""
        return False

    def displaced(
        self, request: RequestState, running: Sequence[RequestState]
    ) -> list[RequestState]:
        """Nobody gives way to those who wait."""
        return []

    def gives_way(self, request: RequestState) -> None:
        """Nobody counts."""

    def adapter_line(self, wanted: Sequence[AdapterRecord]) -> Iterable[AdapterRecord]:
        """The longest waiting comes first."""
        return wanted

    def prepares(self, adapter: AdapterHandle) -> None:
        """Nobody counts."""
