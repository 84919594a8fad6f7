"""Policies that give each request one rank when it comes: the lowest is admitted first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.draining import longest_resident
from lorax_router.core.adapters.record import AdapterRecord
from lorax_router.core.policies.heads import OrderedQueues
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
        self._waiting = OrderedQueues()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: RequestState) -> None:
        """Queue by rank."""
        self._waiting.push(request, 0)

    def remove(self, request: RequestState) -> None:
        """Take out."""
        self._waiting.remove(request, 0)

    def start_round(self, now: float, adapters: Collection[AdapterHandle]) -> None:
        """Look at the first of each adapter."""
        self._waiting.begin(adapters)

    def head(self) -> RequestState | None:
        """Return the first in rank."""
        return self._waiting.head()

    def admitted(self, request: RequestState) -> None:
        """It leaves the queue."""
        self.remove(request)

    def deferred(self, request: RequestState) -> None:
        """Go on with the one behind it."""
        self._waiting.defer(request, 0)

    def served(self, request: RequestState, num_tokens: int) -> None:
        """Nobody counts."""

    def served_elsewhere(self, amounts: Mapping[str, float]) -> None:
        """What tenants got makes no difference."""

    def service_here(self) -> Mapping[str, float]:
        """Nobody counts it."""
        return {}

    def step_done(self, num_worth: float) -> None:
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
        ease: Callable[[RequestState], int],
    ) -> RequestState | None:
        """Return the last in rank; of one rank who loses least, then the latest."""
        return max(outranked, key=lambda each: (each.rank, ease(each), each.order))

    def is_entitled(self, request: RequestState, running: Sequence[RequestState]) -> bool:
        """Nobody takes from those that run."""
        return False

    def displaced(
        self, request: RequestState, running: Sequence[RequestState]
    ) -> list[RequestState]:
        """Nobody gives way to those who wait."""
        return []

    def gives_way(self, request: RequestState, to: RequestState) -> None:
        """Nobody counts."""

    def adapter_line(self, wanted: Sequence[AdapterRecord]) -> Iterable[AdapterRecord]:
        """The longest waiting comes first."""
        return wanted

    def drained(
        self,
        record: AdapterRecord,
        candidates: Sequence[AdapterRecord],
        held: Collection[AdapterRecord],
        running: Collection[RequestState],
        *,
        has_waited: bool,
    ) -> AdapterRecord | None:
        """The one resident longest goes."""
        return longest_resident(record, candidates, held, has_waited=has_waited)

    def prepares(self, adapter: AdapterHandle) -> None:
        """Nobody counts."""
