"""The adapter table: which adapters are on the shards, who waits for one, who gives way.

It decides as data. ``orders`` says what to prepare and release on the shards'
prepare lane; ``event`` books what came of it. One table of transitions; an event
that is not in it raises::

    ABSENT ──prepare──► PREPARING ──prepared──► RESIDENT ──evict──► RELEASING
      ▲                     └──────────────────failed──────────────────►┘ │
      └─────────────────────────────released──────────────────────────────┘

A slot and the adapter's bytes are held from ``prepare`` until ``released``: memory
that is still being freed is never promised to another. What failed on one rank may be
on others: it is released as well.

Eviction takes the idle adapter of least worth: greedy-dual-size-frequency (Cherkasova,
1998). worth = clock + uses * cost / bytes, where the clock rises to the worth of
whatever was evicted last, so that old fame fades; the cost of an adapter is what it
took to prepare it last time, in seconds.

When every resident adapter is in use, the longest waiting adapter still gets its turn:
after ``cycle_time_s`` of waiting, one that has been resident for at least
``cycle_time_s`` is *drained*: its requests are no longer admitted. Which one, the policy
says: where it names the one resident longest, an adapter that waits first in line waits
at most 3 * cycle_time_s for its turn to begin, whatever the others do. If the drained one
is not idle ``cycle_time_s`` later, ``overdue`` names it and the scheduler preempts its
rows, or a few cycles later where much was lost to that already. The policy may have one
drained at once, too: one without rows, or whose rows have got tokens for ``cycle_time_s``.
Pinned adapters are exempt, and pins never take all slots.

A *retired* adapter serves those who asked for it already, then leaves for good: its
record goes with its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from math import inf

from lorax_contract.errors import ValidationError
from lorax_contract.eviction import worth
from lorax_contract.step import BASE_ADAPTER, AdapterHandle
from lorax_contract.words import counted
from lorax_router.core.adapters.draining import DrainChoice, longest_resident
from lorax_router.core.adapters.index import AdapterIndex
from lorax_router.core.adapters.record import (
    TRANSITIONS,
    AdapterCapacity,
    AdapterEvent,
    AdapterRecord,
    AdapterState,
    IllegalTransitionError,
    Orders,
)
from lorax_router.core.adapters.room import RoomInTable

__all__ = [
    "AdapterCapacity", "AdapterEvent", "AdapterRecord", "AdapterState", "AdapterTable",
    "IllegalTransitionError", "Orders",
]  # fmt: skip


class AdapterTable:
    """Owns the records of all known adapters. The base model is not one of them.

    Args:
        max_resident: slots on the shards.
        max_bytes: memory for adapters on the fullest rank; None: only slots count.
        cycle_time_s: how long an adapter waits, stays and drains before it is made to move.
    """

    def __init__(
        self, *, max_resident: int, max_bytes: int | None = None, cycle_time_s: float = 2.0
    ) -> None:
        if max_resident < 1:
            raise ValueError("max_resident must be at least 1")
        self.max_resident = max_resident
        self.max_bytes = max_bytes
        self.cycle_time_s = cycle_time_s
        self._records: dict[AdapterHandle, AdapterRecord] = {}
        # The many that are known and neither hold a slot nor should cost a step nothing.
        self._index = AdapterIndex()
        self._clock = 0.0
        # Of tenants that may hold a part only while others want it: from 0 to 1.
        self._shares: dict[str, float] = {}
        # What could not be prepared, until its release is ordered.
        self._failed: list[AdapterHandle] = []

    # --- what is known ------------------------------------------------------------

    def __contains__(self, handle: AdapterHandle) -> bool:
        return handle in self._records

    def __getitem__(self, handle: AdapterHandle) -> AdapterRecord:
        return self._records[handle]

    def add(
        self, handle: AdapterHandle, nbytes: int, *, pin: bool = False, content: str = "",
        rank: int = 0,
    ) -> None:  # fmt: skip
        """Make an adapter known; ValidationError if it can never be resident."""
        if handle in self._records or handle == BASE_ADAPTER:
            raise ValueError(f"adapter handle {handle} is in use")
        if self.max_bytes is not None and nbytes > self.max_bytes:
            raise ValidationError(
                f"the adapter takes {nbytes} bytes, more than the {self.max_bytes} that the "
                "server keeps for adapters; raise --adapter-memory-fraction"
            )
        self._records[handle] = AdapterRecord(handle, nbytes, content, rank)
        if pin:
            self.pin(handle)

    def remove(self, handle: AdapterHandle) -> None:
        """Forget an adapter that is absent and that nobody needs."""
        record = self._records[handle]
        if record.state is not AdapterState.ABSENT or not record.is_idle:
            raise ValueError(f"adapter {handle} is {record.state.value} or in use")
        self._forget(record)

    def want(self, handle: AdapterHandle, now: float) -> None:
        """Have an adapter prepared although no request waits for it."""
        record = self._records[handle]
        if record.state is not AdapterState.RESIDENT:
            record.is_called = True
            if record.wanted_at is None:
                record.wanted_at = now
            self._index.sort(record)

    def retire(self, handle: AdapterHandle) -> None:
        """Let an adapter go for good once nobody needs it any more."""
        record = self._records[handle]
        record.is_retired = True
        record.is_pinned = record.is_called = False
        if record.is_idle:
            record.wanted_at = None
        self._index.sort(record)
        self._drop_if_gone(record)

    def pin(self, handle: AdapterHandle) -> None:
        """Keep an adapter resident; ValidationError when the others would be left without room."""
        record = self._records[handle]
        if not record.is_pinned:
            self._check_pin(record)
        record.is_pinned = True
        record.drained_at = None
        self._index.sort(record)

    def _check_pin(self, record: AdapterRecord) -> None:
        if len(self._index.pinned) + 1 >= self.max_resident:
            raise ValidationError(
                f"the server has {counted(self.max_resident, 'slot')} for adapters, pins hold "
                f"{len(self._index.pinned)} of them, and one must stay free for the others: "
                "raise --max-active-adapters"
            )
        if self.max_bytes is None:
            return
        left = (
            self.max_bytes
            - sum(each.nbytes for each in self._index.pinned.values())
            - record.nbytes
        )
        needed = max(
            (
                each.nbytes
                for each in self._records.values()
                if each is not record
                and not each.is_pinned
                and (each.is_called or not each.is_idle)
            ),
            default=0,
        )
        if left < needed:
            what = "adapters in use would never fit beside it" if left >= 0 else "that do not fit"
            raise ValidationError(
                f"the adapter takes {record.nbytes} bytes and pinned ones would leave "
                f"{max(left, 0)} of {self.max_bytes}: {what}; unpin one or raise "
                "--adapter-memory-fraction"
            )

    def unpin(self, handle: AdapterHandle) -> None:
        """Let an adapter be evicted again."""
        record = self._records[handle]
        record.is_pinned = False
        self._index.sort(record)

    def measured(self, handle: AdapterHandle, nbytes: int) -> None:
        """Book what an adapter takes in truth; what was known before was its upper limit."""
        record = self._records[handle]
        record.nbytes = nbytes
        self._index.sort(record)

    def check_possible(self, handle: AdapterHandle) -> None:
        """Raise ValidationError when pinned adapters leave no memory for this one, ever."""
        record = self._records[handle]
        if self.max_bytes is None or record.is_pinned:
            return
        pinned = sum(each.nbytes for each in self._index.pinned.values())
        if pinned + record.nbytes > self.max_bytes:
            raise ValidationError(
                f"the adapter takes {record.nbytes} bytes, and pinned adapters leave "
                f"{self.max_bytes - pinned} of {self.max_bytes}; unpin one or raise "
                "--adapter-memory-fraction"
            )

    def capacity(self) -> AdapterCapacity:
        """Return how much room there is for adapters, and how much of it is taken."""
        return AdapterCapacity(
            self.max_resident, len(self._index.held), self.max_bytes, self._index.bytes_held
        )

    def check(self, *, in_play_only: bool = False) -> None:
        """Raise AssertionError if an invariant broke: O(adapters), for tests.

        With ``in_play_only`` the many that are known and do nothing are not looked at: for
        whenever the server is idle.
        """
        records = self.in_play() if in_play_only else self.snapshot()
        if len(self._index.held) > self.max_resident:
            raise AssertionError("more adapters on the shards than slots")
        self._index.check(records)
        for record in records:
            if min(record.num_waiting, record.num_running) < 0:
                raise AssertionError(f"adapter {record.handle} has less than no requests")
            if record.num_running and record.state is not AdapterState.RESIDENT:
                raise AssertionError(f"adapter {record.handle} runs and is {record.state.value}")

    def find(self, handle: AdapterHandle) -> AdapterRecord | None:
        """Return an adapter's record, not to be changed; None if it is not known."""
        return self._records.get(handle)

    def in_play(self) -> list[AdapterRecord]:
        """Return those that hold a slot or should; the core alone changes them."""
        return [*self._index.held.values(), *self._index.wanted.values()]

    def snapshot(self) -> list[AdapterRecord]:
        """Return all records; they are not to be changed."""
        return list(self._records.values())

    # --- who needs what -----------------------------------------------------------

    def asked_by(self, handle: AdapterHandle, tenant: str, share: float | None) -> None:
        """A tenant, which may hold a share of slots and bytes, asks for the adapter: it is its own.

        An adapter belongs to whoever asked for it last. Comes before ``waits``.
        """
        if share is None:
            self._shares.pop(tenant, None)
        else:
            self._shares[tenant] = share
        if handle != BASE_ADAPTER:
            self._records[handle].tenant = tenant

    def waits(self, handle: AdapterHandle, now: float) -> None:
        """A request that needs the adapter was queued."""
        if handle == BASE_ADAPTER:
            return
        record = self._records[handle]
        record.num_waiting += 1
        if record.state is not AdapterState.RESIDENT and record.wanted_at is None:
            record.wanted_at = now
        self._index.use(record)

    def runs(self, handle: AdapterHandle, now: float) -> None:
        """A queued request was admitted."""
        if handle == BASE_ADAPTER:
            return
        record = self._records[handle]
        record.num_waiting -= 1
        record.num_running += 1
        record.num_uses += 1
        record.last_used_at = now
        self._assess(record)
        self._index.use(record)

    def returns(self, handle: AdapterHandle, now: float) -> None:
        """A running request was preempted and waits again."""
        if handle == BASE_ADAPTER:
            return
        self._records[handle].num_running -= 1
        self.waits(handle, now)

    def leaves(self, handle: AdapterHandle, *, was_running: bool) -> None:
        """A request ended."""
        if handle == BASE_ADAPTER:
            return
        record = self._records[handle]
        if was_running:
            record.num_running -= 1
        else:
            record.num_waiting -= 1
            if record.num_waiting == 0 and not record.is_called:
                record.wanted_at = None
        self._index.use(record)
        self._drop_if_gone(record)

    def progresses(self, handle: AdapterHandle, now: float) -> None:
        """A running request got a token."""
        if handle != BASE_ADAPTER and self._records[handle].progressed_at is None:
            self._records[handle].progressed_at = now

    def is_resident(self, handle: AdapterHandle) -> bool:
        """Whether an adapter is on the shards, ready for requests."""
        record = self._index.held.get(handle)
        return record is not None and record.state is AdapterState.RESIDENT

    def is_draining(self, handle: AdapterHandle) -> bool:
        """Whether an adapter is about to make room for another."""
        return handle in self._index.drained

    def admitting(self) -> Collection[AdapterHandle]:
        """Return the adapters with which a request may enter the next step, the base model's too."""
        admitting = dict.fromkeys((BASE_ADAPTER, *self._index.resident))
        for each in self._index.drained:
            del admitting[each]
        return admitting

    # --- decisions ------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether ``orders`` decides nothing, whoever of those that run ends."""
        return self._index.is_settled

    def orders(
        self,
        now: float,
        line: Callable[[Sequence[AdapterRecord]], Iterable[AdapterRecord]] = iter,
        drain: DrainChoice = longest_resident,
    ) -> Orders:
        """Decide what to prepare and what to evict.

        ``line`` orders those that wait, who come with the longest waiting first; ``drain`` says who
        is drained where all that hold slots are in use. One that does not fit reserves what is being
        freed: those behind it get what is free and what it does not need once others have left.
        """
        orders = Orders()
        orders.release, self._failed = self._failed, []
        for record in list(self._index.leaving.values()):
            self._move(record, AdapterEvent.EVICT, now)
            orders.release.append(record.handle)
        waiting = self._index.in_line()
        if not waiting:
            self._stop_draining()
        room = RoomInTable(self, self._index, self._shares, orders, now, drain)
        if not waiting or room.is_hopeless:
            return orders
        for record in room.in_turn(line(waiting)):
            if room.is_spent:
                break
            if room.fits(record):
                self._move(record, AdapterEvent.PREPARE, now)
                orders.prepare.append(record.handle)
            else:
                room.reserve(record)
        return orders

    def evict(self, record: AdapterRecord, now: float) -> None:
        """Let an idle adapter go: for the room that those who wait get, and nobody else."""
        self._clock = max(self._clock, record.worth)
        self._move(record, AdapterEvent.EVICT, now)

    def drain_one(
        self,
        record: AdapterRecord,
        now: float,
        find_first: Callable[[Sequence[AdapterRecord]], list[AdapterRecord]],
        choose: DrainChoice,
        *,
        only_first: bool,
    ) -> None:
        """Stop admitting for one adapter in use, if one that waits may have its slot.

        Of those that are to go first, if there are any, and of others unless only these may.
        """
        if record.wanted_at is None:
            return
        others = [
            each for each in self._index.resident.values()
            if not each.is_pinned and each.drained_at is None
        ]  # fmt: skip
        first = find_first(others)
        if first or only_first:
            others = first
        held = self._index.held.values()
        cycle = self.cycle_time_s
        # One at a time: its memory is meant for the head of the line.
        if now - record.wanted_at >= cycle and not self._index.drained:
            settled = [each for each in others if now - each.resident_at >= cycle]
            drained = choose(record, settled, held, has_waited=True)
            if drained is not None:
                self._drain(drained, now)
                return
        ready = [each for each in others if not each.num_running or self._has_had(each, now)]
        if (drained := choose(record, ready, held, has_waited=False)) is not None:
            self._drain(drained, -inf)

    def _has_had(self, record: AdapterRecord, now: float) -> bool:
        """Whether an adapter's rows have got tokens for a cycle."""
        since = record.progressed_at
        return since is not None and now - since >= self.cycle_time_s

    def _drain(self, record: AdapterRecord, since: float) -> None:
        record.drained_at = since
        self._index.sort(record)

    def _stop_draining(self) -> None:
        """Nobody waits for a slot any more: whoever was drained goes on."""
        for each in list(self._index.drained.values()):
            each.drained_at = None
            self._index.sort(each)

    def overdue(self, now: float, num_cycles: int = 1) -> list[AdapterHandle]:
        """Return drained adapters whose running rows had so many cycles since then.

        Those that make room at once had enough whatever they had.
        """
        least = num_cycles * self.cycle_time_s
        return [
            each.handle
            for each in self._index.drained.values()
            if each.num_running
            and each.drained_at is not None
            and each.progressed_at is not None
            and (each.drained_at == -inf or now - max(each.drained_at, each.progressed_at) >= least)
        ]

    # --- events ---------------------------------------------------------------------

    def event(self, handle: AdapterHandle, event: AdapterEvent, now: float) -> None:
        """Book what came of an order."""
        self._move(self._records[handle], event, now)

    def shards_lost(self, max_bytes: int | None) -> None:
        """Others took the place of the shards: all adapters are absent, those in demand wait again.

        Of the pinned ones only those stay pinned that fit together into ``max_bytes``.
        """
        self.max_bytes = max_bytes
        self._failed.clear()
        self._unpin_beyond_budget()
        for record in self._records.values():
            record.state = AdapterState.ABSENT
            record.drained_at = None
            is_wanted = record.num_waiting or record.num_running or record.is_called
            record.wanted_at = record.last_used_at if is_wanted else None
            self._index.sort(record)
        for record in list(self._records.values()):
            self._drop_if_gone(record)

    def _unpin_beyond_budget(self) -> None:
        """Unpin what does not fit, the earliest pinned stay; call for nothing that never fits."""
        if self.max_bytes is None:
            return
        left = self.max_bytes
        for record in self._index.pinned.values():
            record.is_pinned = record.nbytes <= left
            left -= record.nbytes * record.is_pinned
        for record in self._records.values():
            if not record.is_pinned and record.nbytes > left:
                record.is_called = False

    def _move(self, record: AdapterRecord, event: AdapterEvent, now: float) -> None:
        before = record.state
        try:
            record.state = TRANSITIONS[before, event]
        except KeyError:
            raise IllegalTransitionError(
                f"adapter {record.handle} is {before.value}: {event.value} cannot happen"
            ) from None
        if event is AdapterEvent.PREPARE:
            record.ordered_at = now
        elif event is AdapterEvent.PREPARED:
            record.resident_at = now
            record.prepare_s = max(now - record.ordered_at, 1e-3)
            record.wanted_at = None
            record.is_called, record.num_losses = False, 0
            record.progressed_at = None
            self._assess(record)
        elif event is AdapterEvent.FAILED:
            # It would be prepared again at once, for ever.
            record.is_pinned = record.is_called = False
            self._failed.append(record.handle)
        elif record.state is AdapterState.ABSENT:
            record.drained_at = None
            # Whoever came while it was being freed has waited since then.
            is_wanted = record.num_waiting or record.is_called
            waits_since = now if record.wanted_at is None else record.wanted_at
            record.wanted_at = waits_since if is_wanted else None
        self._index.sort(record)
        self._drop_if_gone(record)

    def _drop_if_gone(self, record: AdapterRecord) -> None:
        if record.is_retired and record.is_idle and record.state is AdapterState.ABSENT:
            self._forget(record)

    def _forget(self, record: AdapterRecord) -> None:
        del self._records[record.handle]
        self._index.forget(record.handle)

    def _assess(self, record: AdapterRecord) -> None:
        record.worth = worth(self._clock, record.num_uses, record.prepare_s, record.nbytes)
