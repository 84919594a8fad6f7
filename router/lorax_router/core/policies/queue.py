"""The waiting requests by adapter, and how far the current round of admissions got in them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from lorax_contract.step import AdapterHandle
from lorax_router.core.request import RequestState, rank_of

Group = TypeVar("Group", bound=Hashable)


class RequestQueue(Generic[Group]):
    """Requests of one adapter and one group, by rank; a preempted one returns to its place.

    A round looks at its head, which is admitted or deferred; a deferred request stays
    where it is, and the round goes on with the one behind it.
    """

    __slots__ = ("_behind", "_requests", "adapter", "group", "num_deferred")

    def __init__(
        self, adapter: AdapterHandle, group: Group, behind: list[RequestQueue[Group]]
    ) -> None:
        self.adapter = adapter
        self.group = group
        # Takes up those that the current round went on in.
        self._behind = behind
        self._requests: list[RequestState] = []
        self.num_deferred = 0

    def __len__(self) -> int:
        return len(self._requests)

    def push(self, request: RequestState) -> None:
        """Queue by rank: O(log n) comparisons."""
        insort(self._requests, request, key=rank_of)

    def remove(self, request: RequestState) -> None:
        """Find by rank and take out."""
        index = bisect_left(self._requests, rank_of(request), key=rank_of)
        del self._requests[index]
        self.num_deferred -= index < self.num_deferred

    def start_round(self) -> None:
        """Begin again with the first."""
        self.num_deferred = 0

    def first(self) -> RequestState:
        """Return the first request in rank; there is one."""
        return self._requests[0]

    def head(self) -> RequestState | None:
        """Return the first request that this round did not defer."""
        if self.num_deferred < len(self._requests):
            return self._requests[self.num_deferred]
        return None

    def defer(self) -> None:
        """Go on with the request behind the head."""
        if not self.num_deferred:
            self._behind.append(self)
        self.num_deferred += 1

    def requests(self) -> list[RequestState]:
        """Return all of them, the first in rank first."""
        return list(self._requests)


class WaitingRequests(Generic[Group]):
    """All queues: one for each adapter and group, none of them empty."""

    def __init__(self) -> None:
        self._queues: dict[AdapterHandle, dict[Group, RequestQueue[Group]]] = {}
        self._by_group: dict[Group, dict[AdapterHandle, RequestQueue[Group]]] = {}
        # Those that do not stand at their first request.
        self._behind: list[RequestQueue[Group]] = []
        self._num_requests = 0

    def __len__(self) -> int:
        return self._num_requests

    def push(self, request: RequestState, group: Group) -> None:
        """Queue a request."""
        adapter = request.spec.adapter
        queues = self._queues.setdefault(adapter, {})
        if group not in queues:
            queue = queues[group] = RequestQueue(adapter, group, self._behind)
            self._by_group.setdefault(group, {})[adapter] = queue
        queues[group].push(request)
        self._num_requests += 1

    def remove(self, request: RequestState, group: Group) -> bool:
        """Take a request out; return whether its queue is gone with it."""
        queues = self._queues[request.spec.adapter]
        queue = queues[group]
        queue.remove(request)
        self._num_requests -= 1
        if queue:
            return False
        del queues[group]
        if not queues:
            del self._queues[queue.adapter]
        of_group = self._by_group[group]
        del of_group[queue.adapter]
        if not of_group:
            del self._by_group[group]
        return True

    def start_round(self) -> None:
        """Let each queue begin again with its first request: O(those that went on)."""
        for queue in self._behind:
            queue.start_round()
        self._behind.clear()

    def by_group(self) -> Mapping[Group, Mapping[AdapterHandle, RequestQueue[Group]]]:
        """Return all queues by group and adapter; not to be changed."""
        return self._by_group

    def by_adapter(self) -> Mapping[AdapterHandle, Mapping[Group, RequestQueue[Group]]]:
        """Return all queues by adapter and group; not to be changed."""
        return self._queues

    def of(self, adapter: AdapterHandle) -> dict[Group, RequestQueue[Group]]:
        """Return an adapter's queues by group; not to be changed."""
        return self._queues.get(adapter, {})

    def requests(self, adapter: AdapterHandle) -> list[RequestState]:
        """Return all requests that wait with an adapter."""
        return [request for queue in self.of(adapter).values() for request in queue.requests()]
