"""Which adapters are what, at hand: a decision costs what is in play, not what is known."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.record import AdapterRecord, AdapterState

Records = dict[AdapterHandle, AdapterRecord]


class AdapterIndex:
    """Groups of records, true again once ``sort`` was told of each record that changed.

    ::

        held       hold a slot            pinned    in any state
        resident   ready for requests, the one resident for longest first
        drained    of these stopped for others
        evictable  of these idle, or drained of running rows
        retired    of these going for good
        leaving    of the retired those that nobody needs
        releasing  being freed
        wanted     absent and should not be
    """

    def __init__(self) -> None:
        self.held: Records = {}
        self.pinned: Records = {}
        self.resident: Records = {}
        self.drained: Records = {}
        self.evictable: Records = {}
        self.retired: Records = {}
        self.leaving: Records = {}
        self.releasing: Records = {}
        self.wanted: Records = {}
        # Of those that hold a slot, and of those of them that are being released: their bytes.
        self.bytes_held = 0
        self.bytes_releasing = 0
        self._counted: dict[AdapterHandle, tuple[int, int]] = {}
        # Those that are wanted, by when they began to wait.
        self._line: list[tuple[float, AdapterHandle]] = []
        self._places: dict[AdapterHandle, tuple[float, AdapterHandle]] = {}

    def in_line(self) -> list[AdapterRecord]:
        """Return those that are wanted, the longest waiting first."""
        return [self.wanted[handle] for _, handle in self._line]

    @property
    def is_settled(self) -> bool:
        """Whether none comes, goes or is about to."""
        return not (self.wanted or self.drained or self.retired or self.releasing)

    def sort(self, record: AdapterRecord) -> None:
        """Put a record that changed where it belongs."""
        is_absent = record.state is AdapterState.ABSENT
        is_resident = record.state is AdapterState.RESIDENT
        is_wanted = is_absent and (record.wanted_at is not None or record.is_pinned)
        for group, belongs in (
            (self.held, not is_absent),
            (self.pinned, record.is_pinned),
            (self.resident, is_resident),
            (self.drained, is_resident and record.drained_at is not None),
            (self.evictable, record.is_evictable),
            (self.retired, is_resident and record.is_retired),
            (self.leaving, is_resident and record.is_retired and record.is_idle),
            (self.releasing, record.state is AdapterState.RELEASING),
            (self.wanted, is_wanted),
        ):
            if not belongs:
                group.pop(record.handle, None)
            elif record.handle not in group:
                group[record.handle] = record
        self._count(record)
        self._queue(record, is_wanted)

    def use(self, record: AdapterRecord) -> None:
        """The same of a record of which only the requests have changed that need it."""
        if record.state is not AdapterState.RESIDENT:
            self.sort(record)
            return
        handle = record.handle
        if not record.is_evictable:
            self.evictable.pop(handle, None)
        elif handle not in self.evictable:
            self.evictable[handle] = record
        if not (record.is_retired and record.is_idle):
            self.leaving.pop(handle, None)
        elif handle not in self.leaving:
            self.leaving[handle] = record

    def forget(self, handle: AdapterHandle) -> None:
        """Take out a record that is absent."""
        self.pinned.pop(handle, None)
        self.wanted.pop(handle, None)
        self._dequeue(handle)

    def _count(self, record: AdapterRecord) -> None:
        """Keep the sums of bytes."""
        held = 0 if record.state is AdapterState.ABSENT else record.nbytes
        releasing = held if record.state is AdapterState.RELEASING else 0
        old_held, old_releasing = self._counted.pop(record.handle, (0, 0))
        self.bytes_held += held - old_held
        self.bytes_releasing += releasing - old_releasing
        if held:
            self._counted[record.handle] = held, releasing

    def _queue(self, record: AdapterRecord, is_wanted: bool) -> None:
        """Keep the line."""
        place = None
        if is_wanted:
            # A pin alone waits behind all requests.
            since = math.inf if record.wanted_at is None else record.wanted_at
            place = since, record.handle
        if self._places.get(record.handle) == place:
            return
        self._dequeue(record.handle)
        if place is not None:
            self._places[record.handle] = place
            insort(self._line, place)

    def _dequeue(self, handle: AdapterHandle) -> None:
        place = self._places.pop(handle, None)
        if place is not None:
            del self._line[bisect_left(self._line, place)]

    def check(self, records: Iterable[AdapterRecord]) -> None:
        """Raise AssertionError unless the groups are what sorting all records anew gives."""
        anew = AdapterIndex()
        for record in records:
            anew.sort(record)
        for name, value in vars(anew).items():
            if getattr(self, name) != value:
                raise AssertionError(f"the index of adapters is wrong about {name.strip('_')}")
