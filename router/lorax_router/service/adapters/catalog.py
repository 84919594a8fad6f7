"""Which name leads to which content, and which content has which handle. Nothing waits here."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterRef,
    FetchedAdapter,
    MergeSpec,
)
from lorax_contract.errors import AdapterNotLoadedError, ValidationError
from lorax_contract.step import AdapterHandle
from lorax_router.core.adapter_table import AdapterRecord, AdapterState
from lorax_router.service.adapters.listing import KnownName
from lorax_router.service.engine.port import AdapterEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSelection:
    """Which adapter a request wants: one, or several merged."""

    refs: tuple[AdapterRef, ...]
    merge: MergeSpec | None = None
    token: str | None = field(default=None, repr=False)

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
    label: str
    # The selection of the last request, to fetch what has left the disk.
    selection: AdapterSelection
    # Names that lead here now.
    names: set[str] = field(default_factory=set)
    # Requests that hold it, from their resolution to their end.
    num_leases: int = 0
    num_uses: int = 0
    # Unix time.
    last_used_at: float | None = None
    is_retired: bool = False
    # Set while nobody holds it.
    unheld: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_leaving(self) -> bool:
        """Whether it serves those who hold it and nobody else."""
        return self.is_retired or not self.names


class AdapterCatalog:
    """Owns names and entries. Only AdapterDirectory and AdapterManager call it.

    An entry that no name leads to is detached: its key is free for a new one at once,
    and ``on_detached`` has it leave the shards when nobody holds it any more.

    Args:
        on_detached: called once for each entry that was detached.
        max_names: names that are remembered.
        max_idle: adapters without a slot and without a request that keep their handle.
    """

    def __init__(
        self, on_detached: Callable[[CatalogEntry], None], *, max_names: int, max_idle: int
    ) -> None:
        self._on_detached = on_detached
        self._max_names = max_names
        self._max_idle = max_idle
        self._engine: AdapterEngine | None = None
        self._handles = itertools.count(1)
        self._names: OrderedDict[str, KnownName] = OrderedDict()
        # By content.
        self._entries: dict[str, CatalogEntry] = {}
        # Also those that are detached and not gone yet.
        self.by_handle: dict[AdapterHandle, CatalogEntry] = {}

    def attach(self, engine: AdapterEngine) -> None:
        """Say which engine knows the handles."""
        self._engine = engine

    @property
    def engine(self) -> AdapterEngine:
        """The engine that knows the handles."""
        assert self._engine is not None
        return self._engine

    # --- names --------------------------------------------------------------------

    def name(self, ref: AdapterRef) -> KnownName:
        """Return what is known of a name, made if it is new."""
        key = str(ref)
        record = self._names.get(key)
        if record is None:
            record = self._names[key] = KnownName(ref)
            if len(self._names) > self._max_names:
                self._drop_old_names()
        self._names.move_to_end(key)
        return record

    def find(self, ref: AdapterRef) -> KnownName | None:
        """Return what is known of a name, None if nothing is."""
        return self._names.get(str(ref))

    def entry_of(self, name: KnownName) -> CatalogEntry | None:
        """Return what a name leads to."""
        return self._entries.get(name.content_key or "")

    def require(self, ref: AdapterRef) -> tuple[KnownName, CatalogEntry]:
        """Return a name and what it leads to; AdapterNotLoadedError if that is nothing."""
        name = self.find(ref)
        entry = self.entry_of(name) if name is not None else None
        if name is None or entry is None:
            raise AdapterNotLoadedError(
                f"adapter {ref} is not loaded; GET /v1/adapters lists those that are"
            )
        return name, entry

    def forget(self, name: KnownName) -> CatalogEntry | None:
        """Drop a name; returns what it led to."""
        entry = self.entry_of(name)
        self._names.pop(str(name.ref), None)
        self._leave(name)
        name.is_pinned = False
        return entry

    def names(self) -> Iterator[KnownName]:
        """All names, least recently asked for first."""
        return iter(self._names.values())

    def entries(self) -> Iterator[CatalogEntry]:
        """All entries that are not detached."""
        return iter(self._entries.values())

    def _drop_old_names(self) -> None:
        """Forget an eighth of the names, those first that lead nowhere."""
        surplus = self._max_names // 8
        idle = [r for r in self._names.values() if not (r.num_resolving or r.is_pinned)]
        # The last one is the name that is being made.
        idle = [record for record in idle[:-1] if not self._is_held(record)]
        idle.sort(key=lambda record: record.content_key is not None)
        for record in idle[:surplus]:
            self.forget(record)

    def _is_held(self, name: KnownName) -> bool:
        entry = self.entry_of(name)
        return entry is not None and entry.num_leases > 0

    # --- contents -----------------------------------------------------------------

    def place(self, selection: AdapterSelection, fetched: Sequence[FetchedAdapter]) -> CatalogEntry:
        """Return the entry of a content, made if it is new, and lead the name to it."""
        content = AdapterContent(parts=tuple(each.part for each in fetched), merge=selection.merge)
        entry = self._entries.get(content.key)
        if entry is None:
            entry = self._add(content, selection, fetched)
        entry.selection = selection
        if selection.merge is None:
            # The files that the name leads to now are surely there.
            entry.content = content
            name = self.name(selection.refs[0])
            name.fetched = fetched[0]
            self._lead(name, entry)
        else:
            # A merge has no name that could lead elsewhere: it stays until it is idle for long.
            entry.names.add(content.key)
        return entry

    def _add(
        self,
        content: AdapterContent,
        selection: AdapterSelection,
        fetched: Sequence[FetchedAdapter],
    ) -> CatalogEntry:
        handle = AdapterHandle(next(self._handles))
        # Of a merge at most: what all its parts take together.
        self.engine.add_adapter(handle, sum(each.device_bytes for each in fetched))
        entry = CatalogEntry(handle, content, selection.label, selection)
        self._entries[content.key] = entry
        self.by_handle[handle] = entry
        return entry

    def _lead(self, name: KnownName, entry: CatalogEntry) -> None:
        """Let a name lead to an entry; it takes its pin along."""
        entry.names.add(str(name.ref))
        if name.content_key == entry.content.key:
            return
        self._leave(name)
        name.content_key = entry.content.key
        if name.is_pinned:
            try:
                self.engine.pin_adapter(entry.handle)
            except ValidationError as error:
                name.is_pinned = False
                logger.warning("adapter %s is not pinned any more: %s", name.ref, error)

    def _leave(self, name: KnownName) -> None:
        old = self.entry_of(name)
        name.content_key = None
        if old is None:
            return
        old.names.discard(str(name.ref))
        if name.is_pinned and not self.is_pinned(old):
            self.engine.unpin_adapter(old.handle)
        if not old.names and not old.num_leases:
            self.detach(old)

    def is_pinned(self, entry: CatalogEntry) -> bool:
        """Whether a pinned name leads to an entry."""
        names = (self._names.get(text) for text in entry.names)
        return any(name is not None and name.is_pinned for name in names)

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
        self._on_detached(entry)

    def unshared(self, entry: CatalogEntry) -> list[AdapterPart]:
        """The parts of an entry that no other adapter is made of."""
        used = {
            part.content_digest
            for other in self.by_handle.values()
            if other is not entry
            for part in other.content.parts
        }
        return [part for part in entry.content.parts if part.content_digest not in used]

    # --- leases -------------------------------------------------------------------

    def hold(self, entry: CatalogEntry) -> None:
        """Keep an entry's handle good until it is let go."""
        entry.num_leases += 1
        entry.unheld.clear()

    def let_go(self, entry: CatalogEntry) -> None:
        """End one hold on an entry."""
        entry.num_leases -= 1
        if entry.num_leases == 0:
            entry.unheld.set()
            if not entry.names:
                self.detach(entry)
            self._drop_idle_entries()

    def used(self, selection: AdapterSelection, entry: CatalogEntry) -> None:
        """Note that a request uses an adapter."""
        entry.num_uses += 1
        entry.last_used_at = now = time.time()
        for ref in selection.refs:
            if (name := self.find(ref)) is not None:
                name.num_uses += 1
                name.last_used_at = now

    def _drop_idle_entries(self) -> None:
        """Forget adapters that nobody used for long, so that names cannot fill the memory."""
        if len(self._entries) <= self._max_idle:
            return
        absent = {
            record.handle
            for record in self.engine.adapter_records()
            if record.state is AdapterState.ABSENT and record.is_idle and not record.is_wanted
        }
        idle = [e for e in self._entries.values() if not e.num_leases and e.handle in absent]
        idle.sort(key=lambda entry: entry.last_used_at or 0.0)
        for entry in idle[: len(self._entries) - self._max_idle // 2]:
            for text in entry.names:
                self._names.pop(text, None)
            entry.names.clear()
            self.detach(entry)

    # --- facts --------------------------------------------------------------------

    def records(self) -> list[tuple[KnownName, CatalogEntry | None, AdapterRecord | None]]:
        """Return every known name with what it leads to and the engine's record of that."""
        by_handle = {record.handle: record for record in self.engine.adapter_records()}
        found: list[tuple[KnownName, CatalogEntry | None, AdapterRecord | None]] = []
        for name in self._names.values():
            entry = self.entry_of(name)
            found.append((name, entry, by_handle.get(entry.handle) if entry is not None else None))
        return found

    def nameless(self) -> list[tuple[CatalogEntry, AdapterRecord]]:
        """Return what the engine knows and no name leads to: merges, and what was replaced."""
        found = []
        for record in self.engine.adapter_records():
            entry = self.by_handle.get(record.handle)
            if entry is not None and (entry.is_leaving or entry.content.merge is not None):
                found.append((entry, record))
        return found
