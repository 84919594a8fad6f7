"""LoRAX's own rule, to compare with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile

from lorax_contract.step import BASE_ADAPTER, AdapterHandle, RequestId
from lorax_router.core.adapters.record import AdapterRecord, AdapterState
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.request import RequestState


class OldestHead(FirstComeFirstServed):
    """The oldest head among adapters on the shards, those within their cycle time first.

    A request enters only if the most that it may need is free, and one that does not fit
    stops all others. Adapters come strictly in the order in which they began to wait: one
    that cannot come yet stops those behind it.

    While requests run, others enter only if ``waiting_served_ratio`` times as many wait, those
    of absent adapters counted; or if those that run had ``max_waiting_tokens`` tokens each
    since somebody entered.
    """

    reserves_all = True

    def __init__(
        self,
        adapters: AdapterTable,
        *,
        waiting_served_ratio: float = 1.2,
        max_waiting_tokens: int = 20,
    ) -> None:
        super().__init__(max_bypasses=0)
        self._adapters = adapters
        self._ratio, self._max_tokens = waiting_served_ratio, max_waiting_tokens
        self._running: set[RequestId] = set()
        # Tokens that those that run had since somebody entered: each time one had another.
        self._num_tokens = 0
        self._had_one: set[RequestId] = set()

    def push(self, request: RequestState) -> None:
        """Queue; whoever gave way does not run."""
        self._running.discard(request.request_id)
        super().push(request)

    def admitted(self, request: RequestState) -> None:
        """Count anew."""
        super().admitted(request)
        self._running.add(request.request_id)
        self._num_tokens = 0
        self._had_one.clear()

    def served(self, request: RequestState, num_tokens: int) -> None:
        """Count the rounds in which each has one token."""
        if request.request_id in self._had_one:
            self._had_one.clear()
        if not self._had_one:
            self._num_tokens += 1
        self._had_one.add(request.request_id)

    def step_done(self, num_worth: float) -> None:
        """Nobody counts."""

    def ended(self, request: RequestState) -> None:
        """It runs no more."""
        self._running.discard(request.request_id)

    def start_round(self, now: float, adapters: Collection[AdapterHandle]) -> None:
        """Look at adapters within their cycle time; at all of them if none of these waits."""
        is_patient = self._num_tokens < self._max_tokens
        if is_patient and len(self) < int(len(self._running) * self._ratio):
            super().start_round(now, ())
            return
        # Who came last stands last: behind the first that is not young there is no other.
        young = takewhile(lambda each: self._is_young(each, now), reversed(list(adapters)))
        super().start_round(now, set(young))
        if self.head() is None:
            super().start_round(now, adapters)

    def _is_young(self, adapter: AdapterHandle, now: float) -> bool:
        if adapter == BASE_ADAPTER:
            return False
        return now - self._adapters[adapter].resident_at < self._adapters.cycle_time_s

    def adapter_line(self, wanted: Sequence[AdapterRecord]) -> Iterator[AdapterRecord]:
        """Stop behind the first that cannot come."""
        for record in wanted:
            yield record
            if record.state is AdapterState.ABSENT:
                return
