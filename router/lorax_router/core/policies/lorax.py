"""LoRAX's own rule, to compare with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lorax_contract.step import BASE_ADAPTER, AdapterHandle
from lorax_router.core.adapters.record import AdapterRecord, AdapterState
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies.ranked import FirstComeFirstServed


class OldestHead(FirstComeFirstServed):
    """The oldest head among adapters on the shards, those within their cycle time first.

    A request enters only if the most that it may need is free, and one that does not fit
    stops all others. Adapters come strictly in the order in which they began to wait: one
    that cannot come yet stops those behind it.
    """

    reserves_all = True

    def __init__(self, adapters: AdapterTable) -> None:
        super().__init__(max_bypasses=0)
        self._adapters = adapters

    def start_round(self, now: float, adapters: Iterable[AdapterHandle]) -> None:
        """Look at adapters within their cycle time; at all of them if none of these waits."""
        adapters = list(adapters)
        super().start_round(now, (each for each in adapters if self._is_young(each, now)))
        if not self._round:
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
