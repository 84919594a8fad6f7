"""Which name leads to which content, and which content has which handle. Nothing waits here."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterRef,
    AdapterUnavailableError,
    FetchedAdapter,
    MergeSpec,
)
from lorax_contract.errors import AdapterNotLoadedError, ValidationError
from lorax_contract.pooling import HeadFacts
from lorax_contract.step import BASE_ADAPTER, AdapterHandle
from lorax_router.core.adapters.record import AdapterRecord, AdapterState
from lorax_router.service.adapters.events import AdapterEvents
from lorax_router.service.adapters.names import KnownName, NameBook, NameView
from lorax_router.service.engine.port import AdapterEngine

logger = logging.getLogger(__name__)

# How many adapters are looked at for one that may go, before there is one more than wanted.
_TRIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSelection:
    """Which adapter a request wants: one, or several merged."""

    refs: tuple[AdapterRef, ...]
    merge: MergeSpec | None = None
    token: str | None = field(default=None, repr=False)
    # What requests get that name no adapter.
    is_default: bool = field(default=False, compare=False)

    @property
    def ids(self) -> str:
        """The ids as headers have them, in LoRAX's way."""
        return ",".join(ref.spoken for ref in self.refs)

    @property
    def label(self) -> str:
        """What the adapter is called in lists, logs and metrics."""
        if self.merge is None:
            return self.refs[0].spoken
        return "merged:" + "+".join(ref.spoken for ref in self.refs)


@dataclass(slots=True)
class CatalogEntry:
    """A content that has a handle. Owned by the AdapterCatalog."""

    handle: AdapterHandle
    content: AdapterContent
    # The selection of the last request, to fetch what has left the disk.
    selection: AdapterSelection
    # The tokens that invoke it; empty: it acts on every token.
    invocation_ids: tuple[int, ...] = ()
    # Its classification head; None: it has none.
    head: HeadFacts | None = None
    # Whether only some callers may know what the last request asked for.
    is_private: bool = False
    # Names that lead here now.
    names: dict[str, KnownName] = field(default_factory=dict)
    # Requests that hold it, from their resolution to their end.
    num_leases: int = 0
    # Unix time.
    last_used_at: float | None = None
    is_retired: bool = False
    # Rows one after the other that had no numbers, and why no more are taken in.
    num_faults: int = 0
    quarantine: AdapterUnavailableError | None = None
    # By the directory's clock.
    quarantined_until: float = 0.0
    # Set while nobody holds it.
    unheld: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def label(self) -> str:
        """What it is called where no name leads to it."""
        return self.selection.label

    @property
    def is_merge(self) -> bool:
        """Whether it is made of several: no name leads to it, each request names its parts."""
        return self.content.merge is not None

    @property
    def is_leaving(self) -> bool:
        """Whether it serves those who hold it and nobody else."""
        return self.is_retired or not (self.names or self.is_merge)


class AdapterCatalog:
    """Owns names and entries. Only AdapterDirectory, AdapterManager and lists read them.

    An entry that no name leads to is detached: its key is free for a new one at once,
    and ``on_detached`` has it leave the shards when nobody holds it any more.

    Args:
        on_detached: called once for each entry that was detached.
        clock: monotonic seconds.
        max_names: names that are remembered.
        max_idle: adapters without a slot and without a request that keep their handle.
    """

    def __init__(
        self,
        on_detached: Callable[[CatalogEntry], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        max_names: int,
        max_idle: int,
    ) -> None:
        self._on_detached = on_detached
        self._max_idle = max_idle
        self._engine: AdapterEngine | None = None
        self._handles = itertools.count(1)
        self.names = NameBook(max_names, clock, self._is_held, self._leave)
        # What became of adapters, for log and metrics.
        self.events = AdapterEvents()
        # By content.
        self._entries: dict[str, CatalogEntry] = {}
        # Also those that are detached and not gone yet.
        self.by_handle: dict[AdapterHandle, CatalogEntry] = {}
        # Those that nobody holds, least recently held first.
        self._unheld: OrderedDict[AdapterHandle, CatalogEntry] = OrderedDict()
        # No name leads to them: merges, and what names led to before and is still in use.
        # Sorted by handle.
        self._merges: list[AdapterHandle] = []
        self._former: list[AdapterHandle] = []
        # Entries that are made of a stored adapter, by its content.
        self._num_made_of: Counter[str] = Counter()

    def attach(self, engine: AdapterEngine) -> None:
        """Say which engine knows the handles."""
        self._engine = engine

    @property
    def engine(self) -> AdapterEngine:
        """The engine that knows the handles."""
        assert self._engine is not None
        return self._engine

    # --- names --------------------------------------------------------------------

    def entry_of(self, name: KnownName) -> CatalogEntry | None:
        """Return what a name leads to."""
        return self._entries.get(name.content_key or "")

    def record_of(self, entry: CatalogEntry | None) -> AdapterRecord | None:
        """Return what the engine knows of an entry."""
        return None if entry is None else self.engine.adapter_record(entry.handle)

    def require(
        self, ref: AdapterRef, token: str | None
    ) -> tuple[KnownName, NameView, CatalogEntry]:
        """Return a name and what it leads to for a caller.

        Raises AdapterNotLoadedError, in the same words for a name that is hidden from this
        caller and for one that nobody knows.
        """
        name = self.names.find(ref)
        view = self.names.good_view(name, token) if name is not None else None
        entry = self.entry_of(name) if name is not None else None
        if name is None or view is None or entry is None:
            raise not_loaded(ref)
        return name, view, entry

    def forget(self, name: KnownName) -> CatalogEntry | None:
        """Drop a name; returns what it led to."""
        entry = self.entry_of(name)
        self._leave(name)
        self.names.forget(name)
        return entry

    def _is_held(self, name: KnownName) -> bool:
        entry = self.entry_of(name)
        return name.is_pinned or (entry is not None and entry.num_leases > 0)

    # --- contents -----------------------------------------------------------------

    def place(self, selection: AdapterSelection, fetched: Sequence[FetchedAdapter]) -> CatalogEntry:
        """Return the entry of a content, made if it is new, and lead the name to it."""
        content = AdapterContent(parts=tuple(each.part for each in fetched), merge=selection.merge)
        entry = self._entries.get(content.key)
        if entry is None:
            entry = self._add(content, selection, fetched)
        entry.selection = selection
        entry.is_private = any(each.access == "token" for each in fetched)
        if not entry.is_merge:
            # The files that the name leads to now are surely there.
            entry.content = content
            name = self.names.find(selection.refs[0])
            # It may have been forgotten, or have come to lead elsewhere, since it was asked for.
            known = name.fetched if name is not None else None
            if name is not None and known is not None and known.part == fetched[0].part:
                self._lead(name, entry)
        return entry

    def _add(
        self,
        content: AdapterContent,
        selection: AdapterSelection,
        fetched: Sequence[FetchedAdapter],
    ) -> CatalogEntry:
        handle = AdapterHandle(next(self._handles))
        # Of a merge at most: what all its parts take together.
        nbytes = sum(each.device_bytes for each in fetched)
        rank = sum(each.max_rank for each in fetched)
        self.engine.add_adapter(handle, nbytes, content.key, rank)
        # The shards refuse a merge with one that is invoked or has a head.
        is_merge = content.merge is not None
        invocation_ids = () if is_merge else fetched[0].invocation_ids
        head = None if is_merge else fetched[0].head
        entry = CatalogEntry(handle, content, selection, invocation_ids, head)
        self._entries[content.key] = self.by_handle[handle] = self._unheld[handle] = entry
        self._num_made_of.update({part.content_digest for part in content.parts})
        if entry.is_merge:
            _include(self._merges, handle)
        return entry

    def _lead(self, name: KnownName, entry: CatalogEntry) -> None:
        """Let a name lead to an entry; it takes its pin along."""
        entry.names[str(name.ref)] = name
        if name.content_key == entry.content.key:
            return
        pinned_by = name.pinned_by
        self._leave(name)
        self.names.lead(name, entry.content.key)
        if pinned_by:
            try:
                self.engine.pin_adapter(entry.handle)
                name.pinned_by = pinned_by
            except ValidationError as error:
                logger.warning("adapter %s is not pinned any more: %s", name.ref, error)

    def _leave(self, name: KnownName) -> None:
        """Let a name lead nowhere, and pin nothing."""
        old = self.entry_of(name)
        was_pinned, name.pinned_by = name.is_pinned, set()
        self.names.lead(name, None)
        if old is None:
            return
        old.names.pop(str(name.ref), None)
        if was_pinned and not self.is_pinned(old):
            self.engine.unpin_adapter(old.handle)
        if not old.names and not old.num_leases:
            self.detach(old)
        elif not old.names:
            _include(self._former, old.handle)

    def is_pinned(self, entry: CatalogEntry) -> bool:
        """Whether a pinned name leads to an entry."""
        return any(name.is_pinned for name in entry.names.values())

    def is_resident(self, content: AdapterContent) -> bool:
        """Whether a content is on the shards."""
        entry = self._entries.get(content.key)
        return entry is not None and self.engine.is_adapter_resident(entry.handle)

    def detach(self, entry: CatalogEntry) -> None:
        """Give an entry up; it leaves the shards soon."""
        if entry.is_retired:
            return
        entry.is_retired = True
        if self._entries.get(entry.content.key) is entry:
            del self._entries[entry.content.key]
        self._unheld.pop(entry.handle, None)
        _exclude(self._merges, entry.handle)
        _include(self._former, entry.handle)
        self._on_detached(entry)

    def gone(self, entry: CatalogEntry) -> None:
        """A detached entry has left the shards."""
        if self.by_handle.pop(entry.handle, None) is None:
            return
        _exclude(self._former, entry.handle)
        for digest in {part.content_digest for part in entry.content.parts}:
            self._num_made_of[digest] -= 1
            if not self._num_made_of[digest]:
                del self._num_made_of[digest]

    def unshared(self, entry: CatalogEntry) -> list[AdapterPart]:
        """The parts of an entry that no other adapter is made of; the entry itself is gone."""
        return [
            part for part in entry.content.parts if part.content_digest not in self._num_made_of
        ]

    # --- leases -------------------------------------------------------------------

    def hold(self, entry: CatalogEntry) -> None:
        """Keep an entry's handle good until it is let go."""
        entry.num_leases += 1
        entry.unheld.clear()
        self._unheld.pop(entry.handle, None)

    def let_go(self, entry: CatalogEntry) -> None:
        """End one hold on an entry."""
        entry.num_leases -= 1
        if entry.num_leases:
            return
        entry.unheld.set()
        if entry.is_leaving:
            self.detach(entry)
        else:
            self._unheld[entry.handle] = entry
        self._drop_unused()

    def used(self, selection: AdapterSelection, entry: CatalogEntry) -> None:
        """Note that a request uses an adapter."""
        entry.last_used_at = now = time.time()
        for ref in selection.refs:
            if (name := self.names.find(ref)) is not None:
                name.num_uses += 1
                name.last_used_at = now
                self.names.touch(name, selection.token)

    def _drop_unused(self) -> None:
        """Forget adapters that nobody used for long, so that names cannot fill the memory."""
        for _ in range(min(_TRIES, len(self._unheld))):
            if len(self._entries) <= self._max_idle:
                return
            handle, entry = next(iter(self._unheld.items()))
            if self._is_busy(handle):
                self._unheld.move_to_end(handle)
                continue
            for name in list(entry.names.values()):
                self.forget(name)
            self.detach(entry)

    def _is_busy(self, handle: AdapterHandle) -> bool:
        """Whether an adapter is on the shards or should be."""
        record = self.engine.adapter_record(handle)
        if record is None:
            return False
        is_absent = record.state is AdapterState.ABSENT
        return record.is_wanted or not (is_absent and record.is_idle)

    # --- facts --------------------------------------------------------------------

    def recently_held(self, most: int) -> list[CatalogEntry]:
        """Return adapters that nobody holds now and are not on the shards, latest held first.

        O(most): so many are looked at.
        """
        latest = itertools.islice(reversed(self._unheld.values()), most)
        return [each for each in latest if not self.engine.is_adapter_resident(each.handle)]

    @property
    def num_merges(self) -> int:
        """Merges that requests can name."""
        return len(self._merges)

    def merges(self, after: AdapterHandle = BASE_ADAPTER) -> Iterator[CatalogEntry]:
        """The merges behind a handle."""
        return self._behind(self._merges, after)

    def former(self, after: AdapterHandle = BASE_ADAPTER) -> Iterator[CatalogEntry]:
        """What names led to before and the shards still have, behind a handle."""
        for entry in self._behind(self._former, after):
            # A name may have come to lead here again.
            if entry.is_leaving and self.record_of(entry) is not None:
                yield entry

    def _behind(self, handles: list[AdapterHandle], after: AdapterHandle) -> Iterator[CatalogEntry]:
        for place in range(bisect.bisect_right(handles, after), len(handles)):
            yield self.by_handle[handles[place]]

    def is_seen(self, entry: CatalogEntry, scopes: Sequence[str]) -> bool:
        """Whether somebody of some scopes may know of an entry that no name leads to."""
        if not entry.is_private:
            return True
        names = [self.names.find(ref) for ref in entry.selection.refs]
        return all(name is not None and self.names.good_in(name, scopes) for name in names)


def _include(handles: list[AdapterHandle], handle: AdapterHandle) -> None:
    """Put a handle into a sorted list, once."""
    place = bisect.bisect_left(handles, handle)
    if handles[place : place + 1] != [handle]:
        handles.insert(place, handle)


def _exclude(handles: list[AdapterHandle], handle: AdapterHandle) -> None:
    place = bisect.bisect_left(handles, handle)
    if handles[place : place + 1] == [handle]:
        del handles[place]


def not_loaded(ref: AdapterRef) -> AdapterNotLoadedError:
    """Return the one answer for what is not known and for what is hidden from the caller."""
    return AdapterNotLoadedError(
        f"adapter {ref} is not loaded; GET /v1/adapters lists those that are, private ones to "
        "callers whose token opened them"
    )
