"""The room that adapters which wait for a slot may have, and who makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.draining import DrainChoice
from lorax_router.core.adapters.index import AdapterIndex
from lorax_router.core.adapters.record import AdapterRecord, Orders


class _Table(Protocol):
    max_resident: int
    max_bytes: int | None

    def evict(self, record: AdapterRecord, now: float) -> None: ...

    def drain_one(
        self,
        record: AdapterRecord,
        now: float,
        find_first: Callable[[Sequence[AdapterRecord]], list[AdapterRecord]],
        choose: DrainChoice,
        *,
        only_first: bool,
    ) -> None: ...


class _Holdings:
    """What tenants hold of slots and bytes, as long as nobody but one round of orders changes it.

    Looked at only where a tenant has a share: O(adapters on the shards), once a round.
    """

    def __init__(self, table: _Table, index: AdapterIndex, shares: Mapping[str, float]) -> None:
        self._table = table
        self._shares = shares
        self._slots: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        if shares:
            for handle, each in index.held.items():
                if handle not in index.releasing:
                    self._add(each, 1)

    def _add(self, record: AdapterRecord, sign: int) -> None:
        tenant = record.tenant
        self._slots[tenant] = self._slots.get(tenant, 0) + sign
        self._bytes[tenant] = self._bytes.get(tenant, 0) + sign * record.nbytes

    def leaves(self, record: AdapterRecord) -> None:
        """An adapter is being released."""
        if self._shares:
            self._add(record, -1)

    def above(self, records: Sequence[AdapterRecord]) -> list[AdapterRecord]:
        """Return those of tenants that hold more than their share already."""
        return [each for each in records if self.is_above(each)] if self._shares else []

    def is_above(self, record: AdapterRecord) -> bool:
        """Whether whose adapter it is holds more than its share already."""
        share = self._shares.get(record.tenant)
        if share is None:
            return False
        slots, table = self._slots.get(record.tenant, 0), self._table
        nbytes = self._bytes.get(record.tenant, 0)
        # One adapter is nobody's flood, however little the share may be.
        return slots > max(1.0, share * table.max_resident) or (
            table.max_bytes is not None and slots > 1 and nbytes > share * table.max_bytes
        )


class RoomInTable:
    """What those who wait may take in one round of orders, in their order.

    Whoever holds more than its share makes room with what is its own, or another's that does,
    too: free room it may have after all others, idle adapters of others are not taken for it. For
    everybody else such adapters are the first to go.
    """

    def __init__(
        self,
        table: _Table,
        index: AdapterIndex,
        shares: Mapping[str, float],
        orders: Orders,
        now: float,
        drain: DrainChoice,
    ) -> None:
        self._table, self._index, self._shares = table, index, shares
        self._orders, self._now, self._drain = orders, now, drain
        # Kept for those before, once what is being freed is free.
        self._slots_reserved = self._bytes_reserved = 0
        # Whether it was drained, and whether its tenant holds no more than it may; then worth.
        self._evictable: list[tuple[bool, bool, float, AdapterHandle]] | None = None
        self._holdings: _Holdings | None = None
        # Whether the last thing that helps whoever does not fit was tried.
        self._is_exhausted = False

    def in_turn(self, line: Iterable[AdapterRecord]) -> Iterator[AdapterRecord]:
        """Yield those who wait in their order, behind them those above their share."""
        others = []
        for record in line:
            if self._held.is_above(record):
                others.append(record)
            else:
                yield record
        yield from others

    @property
    def is_spent(self) -> bool:
        """Whether nobody who comes later can get anything."""
        return self._is_exhausted and not self._has_slot

    @property
    def is_hopeless(self) -> bool:
        """Whether nobody can get anything before what was drained is idle, whatever the order."""
        index = self._index
        return bool(index.drained) and not index.evictable and not self._has_slot

    @property
    def _has_slot(self) -> bool:
        """Whether a slot is free, and one more than those before need once others have left."""
        index, most = self._index, self._table.max_resident
        num_staying = len(index.held) - len(index.releasing) - len(index.drained)
        return len(index.held) < most and num_staying + self._slots_reserved < most

    def fits(self, record: AdapterRecord) -> bool:
        """Whether a record may be prepared now, and those before it wait no longer for it."""
        index, most = self._index, self._table.max_bytes
        if not self._has_slot:
            return False
        if most is None:
            return True
        leaving = index.bytes_releasing + sum(each.nbytes for each in index.drained.values())
        held = index.bytes_held + record.nbytes
        return held <= most and held - leaving + self._bytes_reserved <= most

    def reserve(self, record: AdapterRecord) -> None:
        """Evict idle adapters until a record will fit, drain one if there is none; keep its room."""
        is_above = self._held.is_above(record)
        while not self._is_exhausted and not self._will_fit(record):
            victim = self._next_victim(only_above=is_above)
            if victim is None:
                self._table.drain_one(
                    record, self._now, self._held.above, self._drain, only_first=is_above
                )
                if is_above:
                    # It keeps nobody from taking what it may not take.
                    return
                self._is_exhausted = True
            else:
                self._held.leaves(victim)
                self._table.evict(victim, self._now)
                self._orders.release.append(victim.handle)
        self._slots_reserved += 1
        self._bytes_reserved += record.nbytes

    @property
    def _held(self) -> _Holdings:
        if self._holdings is None:
            self._holdings = _Holdings(self._table, self._index, self._shares)
        return self._holdings

    def _will_fit(self, record: AdapterRecord) -> bool:
        """Whether the record fits once all that is being released is gone."""
        index, most = self._index, self._table.max_bytes
        num_held = len(index.held) - len(index.releasing) + self._slots_reserved
        held = index.bytes_held - index.bytes_releasing + self._bytes_reserved
        return num_held < self._table.max_resident and (
            most is None or held + record.nbytes <= most
        )

    def _next_victim(self, *, only_above: bool) -> AdapterRecord | None:
        """Return the idle adapter of least worth of those that go first.

        These are one that was drained, since it was stopped for this, and then those of tenants
        above their share; ``only_above``: nobody else's.
        """
        if self._evictable is None:
            self._evictable = [self._entry(each) for each in self._index.evictable.values()]
            heapify(self._evictable)
        while self._evictable:
            is_kept, is_within, _, handle = self._evictable[0]
            record = self._index.held[handle]
            if only_above and is_kept and is_within:
                return None
            heappop(self._evictable)
            if is_within or self._held.is_above(record):
                return record
            # Others of its tenant went before, and it holds no more than it may now.
            heappush(self._evictable, self._entry(record))
        return None

    def _entry(self, record: AdapterRecord) -> tuple[bool, bool, float, AdapterHandle]:
        is_within = not self._held.is_above(record)
        return record.drained_at is None, is_within, record.worth, record.handle
