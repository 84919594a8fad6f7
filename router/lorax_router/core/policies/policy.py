"""What a scheduling policy is asked and told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.record import AdapterRecord
from lorax_router.core.request import RequestState


class SchedulingPolicy(Protocol):
    """Who is admitted next, who gives way, and whose adapter comes next.

    Owned by the Scheduler. A round of admissions is ``start_round``, then ``head`` again and
    again: each request that it names is answered by ``admitted`` or ``deferred`` before the
    next one is asked for, so that a policy may charge between two picks.

    ``outranks`` never changes for two requests while both run. Whoever is first in that order
    can take memory from all others: that is what keeps some request moving.
    """

    # How many later requests may be admitted before one that does not fit; then all wait.
    max_bypasses: int
    # Whether a request enters only where the most that it may ever need is free.
    reserves_all: bool
    # Whether running rows may have to give way to a request that waits.
    displaces: bool
    # Whether requests of one tenant, adapter and class are admitted in order of arrival, by-passes
    # aside.
    keeps_order: bool

    def __len__(self) -> int:
        """Return the number of waiting requests."""

    def push(self, request: RequestState) -> None:
        """Queue a new or preempted request."""

    def remove(self, request: RequestState) -> None:
        """Take a request that ended out of the queue; it must be there."""

    def start_round(self, now: float, adapters: Collection[AdapterHandle]) -> None:
        """Begin to admit requests of these adapters; the others delay nobody."""

    def head(self) -> RequestState | None:
        """Return who should be admitted next, None if nobody is left in this round."""

    def admitted(self, request: RequestState) -> None:
        """The head runs: it leaves the queue. How much of it is in the cache is known."""

    def deferred(self, request: RequestState) -> None:
        """The head cannot run now: it stays, and this round does not name it again."""

    def served(self, request: RequestState, num_tokens: int) -> None:
        """A request got output tokens."""

    def served_elsewhere(self, amounts: Mapping[str, float]) -> None:
        """Tenants got something of other servers that share one measure of fairness with this one."""

    def service_here(self) -> Mapping[str, float]:
        """Return what each tenant got here, by its weight; nothing where nobody counts it."""

    def step_done(self, num_worth: float) -> None:
        """A step took as long as computing so many tokens of prompts does."""

    def ended(self, request: RequestState) -> None:
        """A request that ran is over; what it holds is still as it was."""

    def waiting_for(self, adapter: AdapterHandle) -> list[RequestState]:
        """Return the waiting requests that need an adapter."""

    def outranks(self, request: RequestState, other: RequestState) -> bool:
        """Whether ``request`` may take the memory of ``other``."""

    def victim(
        self,
        request: RequestState,
        outranked: Sequence[RequestState],
        running: Collection[RequestState],
        ease: Callable[[RequestState], int],
    ) -> RequestState | None:
        """Return who of those that a running request outranks gives way to it; there is one.

        None: it stands still. The first in rank is never refused. ``ease`` says how little a row
        loses by it, for those that are equal otherwise.
        """

    def is_entitled(self, request: RequestState, running: Sequence[RequestState]) -> bool:
        """Whether the head of a round may take memory that is kept for those that run."""

    def displaced(
        self, request: RequestState, running: Sequence[RequestState]
    ) -> list[RequestState]:
        """Return who of those that run gives way to a head that is entitled, the first first."""

    def gives_way(self, request: RequestState, to: RequestState) -> None:
        """A request that ``displaced`` named does give way to another; what it holds is still as it was."""

    def adapter_line(self, wanted: Sequence[AdapterRecord]) -> Iterable[AdapterRecord]:
        """Put adapters that wait for a slot, the longest waiting first, in their order."""

    def drained(
        self,
        record: AdapterRecord,
        candidates: Sequence[AdapterRecord],
        held: Collection[AdapterRecord],
        running: Collection[RequestState],
        *,
        has_waited: bool,
    ) -> AdapterRecord | None:
        """Return whose slot goes to an adapter that waits, as DrainChoice has it."""

    def prepares(self, adapter: AdapterHandle) -> None:
        """An adapter's preparation was ordered."""
