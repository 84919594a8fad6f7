"""Adapters as a list shows them to a caller: page by page, and no more of them than they may see.

A page costs what is on it, however many adapters are known: names are kept sorted, and at
most so many are looked at for those that a filter lets through.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorax_contract.adapters import (
    ALIAS_SOURCE,
    SOURCES,
    AdapterContent,
    AdapterRef,
    AdapterTiers,
    AdapterUnavailableError,
    FetchedAdapter,
)
from lorax_contract.errors import ValidationError
from lorax_contract.step import BASE_ADAPTER, AdapterHandle
from lorax_router.core.adapters.record import AdapterRecord
from lorax_router.service.adapters.aliases import Alias, AliasBook
from lorax_router.service.adapters.catalog import AdapterCatalog, CatalogEntry
from lorax_router.service.adapters.names import EVERYBODY, KnownName, NameView, stand_of
from lorax_router.service.callers import KEYED_OPERATOR, Caller

Document = dict[str, Any]

STATES = (
    "resolving", "refused", "failed", "absent", "preparing", "resident", "draining", "releasing",
    "retiring",
)  # fmt: skip
LISTED_SOURCES = (*SOURCES, ALIAS_SOURCE)
DEFAULT_PAGE = 100
LARGEST_PAGE = 500
# Lines that are looked at for one page, at most: of a filter few may pass.
_MOST_LOOKED_AT = 2 * LARGEST_PAGE


def shard_state_of(record: AdapterRecord) -> str:
    """Return where an adapter stands on the shards, in one word."""
    return "draining" if record.drained_at is not None else record.state.value


@dataclass(frozen=True, slots=True, kw_only=True)
class ListQuery:
    """Which adapters a caller wants to see; ValidationError for what makes no sense."""

    limit: int = DEFAULT_PAGE
    # Where the page before ended, in its words.
    cursor: str | None = None
    adapter_id: str | None = None
    adapter_source: str | None = None
    state: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= LARGEST_PAGE:
            raise ValidationError(f"`limit` must be from 1 to {LARGEST_PAGE}, got {self.limit}")
        if self.adapter_source not in (None, *LISTED_SOURCES):
            raise ValidationError(
                f"`adapter_source` {self.adapter_source!r} is not known; choose one of "
                f"{', '.join(LISTED_SOURCES)}"
            )
        if self.state is not None and self.state not in STATES:
            raise ValidationError(
                f"`state` {self.state!r} is not known; choose one of {', '.join(STATES)}"
            )

    def id_in(self, source: str) -> str | None:
        """Return the id that is asked for as a source's names have it."""
        if not self.adapter_id:
            return None
        return AdapterRef(source=source, id=self.adapter_id).plain.id


class ListedAdapter(NamedTuple):
    """One line of a list: a name as a caller sees it, or an adapter that no name leads to."""

    ref: AdapterRef
    # What the caller may know of a name; None: not a name's.
    name: KnownName | None
    view: NameView | None
    entry: CatalogEntry | None
    record: AdapterRecord | None
    alias: Alias | None = None

    @property
    def content(self) -> AdapterContent | None:
        """What the adapter is made of."""
        return None if self.entry is None else self.entry.content

    @property
    def state(self) -> str:
        """Where the adapter stands, in one word.

        resolving, refused (for good), failed (a later try may succeed), absent (known, not on
        the shards), preparing, resident, draining (must make room), releasing. What a name led
        to before is retiring.
        """
        if self.view is not None and self.view.num_resolving:
            return "resolving"
        if self.record is None:
            return stand_of(None if self.view is None else self.view.failure)
        if self.name is None and self.entry is not None and self.entry.is_leaving:
            return "retiring"
        return shard_state_of(self.record)


class Viewer(NamedTuple):
    """Who looks at a list: which names can exist for them, and in which scopes they are."""

    caller: Caller
    scopes: tuple[str, ...] = (EVERYBODY,)

    def may_know(self, view: NameView) -> bool:
        """Whether what a view says is for them.

        What tenants asked for in vain is their own affair, though they presented no token, and
        that of the operator of the machine.
        """
        is_somebodys = view.scope != EVERYBODY or view.fetched is not None
        return is_somebodys or not self.caller.has_key or self.caller == KEYED_OPERATOR


class Page(NamedTuple):
    """Some lines of a list, and where the next page begins; None: it was the last."""

    rows: list[ListedAdapter]
    next_cursor: str | None
    # Where to go on where so many lines were looked at that the page is not full. It may tell of
    # what the viewer may not know.
    resume: str | None = None


class AdapterListing:
    """Reads lines from the catalog."""

    def __init__(self, catalog: AdapterCatalog, aliases: AliasBook) -> None:
        self._catalog = catalog
        self._aliases = aliases

    def page(self, query: ListQuery, viewer: Viewer) -> Page:
        """Return the lines that a caller may see: names, merges, former ones."""
        rows: list[ListedAdapter] = []
        last = shown = query.cursor
        for num, (cursor, row) in enumerate(self._from(query, viewer)):
            if len(rows) == query.limit:
                return Page(rows, shown)
            if num == _MOST_LOOKED_AT:
                return Page(rows, last, resume=last)
            if row is not None:
                shown = cursor
                if _passes(row, query):
                    rows.append(row)
            last = cursor
        return Page(rows, None)

    def row(self, name: KnownName, viewer: Viewer) -> ListedAdapter | None:
        """Return a name as a caller sees it; None if they may not."""
        if not viewer.caller.sees(name.ref):
            return None
        view = self._catalog.names.any_in(name, viewer.scopes)
        if view is None or not viewer.may_know(view):
            return None
        entry = self._catalog.entry_of(name) if view.fetched is not None else None
        alias = self._aliases.find(name.ref.id) if name.ref.source == ALIAS_SOURCE else None
        return ListedAdapter(name.ref, name, view, entry, self._catalog.record_of(entry), alias)

    def name_of(self, handle: AdapterHandle, viewer: Viewer) -> str | None:
        """Return what a caller may call an adapter that is in use; None if nothing is for them."""
        entry = self._catalog.by_handle.get(handle)
        if entry is None:
            return None
        rows = (self.row(name, viewer) for name in entry.names.values())
        seen = [each.ref for each in rows if each is not None and each.entry is entry]
        # An alias is what the operator chose to call it.
        seen.sort(key=lambda ref: (ref.source != ALIAS_SOURCE, str(ref)))
        if seen:
            return seen[0].spoken if seen[0].source == ALIAS_SOURCE else str(seen[0])
        nameless = None if entry.names else self._nameless(entry, viewer)
        return None if nameless is None else nameless.ref.id

    def _from(self, query: ListQuery, viewer: Viewer) -> Iterator[tuple[str, ListedAdapter | None]]:
        """All lines behind a cursor, each with the cursor of what is behind it."""
        kind, place = _read_cursor(query.cursor)
        if kind == "n":
            for key in self._keys(query, place, viewer):
                name = self._catalog.names.named(key)
                yield _cursor("n", key), None if name is None else self.row(name, viewer)
        handle = BASE_ADAPTER if kind == "n" else AdapterHandle(int(place))
        if kind != "f":
            for entry in self._catalog.merges(handle):
                yield _cursor("m", str(entry.handle)), self._nameless(entry, viewer)
            handle = BASE_ADAPTER
        for entry in self._catalog.former(handle):
            yield _cursor("f", str(entry.handle)), self._nameless(entry, viewer)

    def _nameless(self, entry: CatalogEntry, viewer: Viewer) -> ListedAdapter | None:
        record = self._catalog.record_of(entry)
        if record is None or not self._catalog.is_seen(entry, viewer.scopes):
            return None
        if not all(viewer.caller.sees(ref) for ref in entry.selection.refs):
            return None
        ref = AdapterRef(source=entry.selection.refs[0].source, id=entry.label)
        return ListedAdapter(ref, None, None, entry, record)

    def _keys(self, query: ListQuery, after: str, viewer: Viewer) -> Iterator[str]:
        sources = sorted(LISTED_SOURCES) if query.adapter_source is None else [query.adapter_source]
        for source in sources:
            first = f"{source}:{query.id_in(source) or ''}"
            for key in self._catalog.names.sorted_from(first, after, viewer.scopes):
                if not key.startswith(first):
                    break
                yield key


def _passes(row: ListedAdapter, query: ListQuery) -> bool:
    return (
        query.adapter_source in (None, row.ref.source)
        and query.id_in(row.ref.source) in (None, row.ref.id, row.ref.spoken)
        and query.state in (None, row.state)
    )


def _cursor(kind: str, place: str) -> str:
    return base64.urlsafe_b64encode(f"{kind}{place}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str | None) -> tuple[str, str]:
    """Return which part of the list it is in (names, merges, former ones), and where."""
    if cursor is None:
        return "n", ""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode()
        kind, place = text[:1], text[1:]
        if kind == "n" or (kind in ("m", "f") and 0 <= int(place) < 2**63):
            return kind, place
    except (ValueError, binascii.Error):
        pass
    raise ValidationError("`cursor` is not one that a list gave as `next_cursor`")


def bytes_of(
    handle: AdapterHandle | None, content: AdapterContent | None, tiers: AdapterTiers
) -> dict[str, int]:
    """Return what an adapter takes in each tier."""
    parts = content.parts if content is not None else ()
    device = tiers.device.get(handle) if handle is not None else None
    return {
        "device": 0 if device is None else device[1],
        "host": sum(tiers.host.get(part.content_digest, 0) for part in parts),
        "disk": sum(tiers.disk.get(part.store_digest, 0) for part in parts),
    }


def document_of(row: ListedAdapter, tiers: AdapterTiers) -> Document:
    """Return a line as JSON has it."""
    record, content, entry, name = row.record, row.content, row.entry, row.name
    fetched: FetchedAdapter | None = None
    failure: AdapterUnavailableError | None = None
    is_pinned, num_uses, last_used_at = False, 0, None
    if row.view is not None:
        failure = row.view.failure
    if entry is not None and entry.quarantine is not None:
        failure = entry.quarantine
    if name is not None and entry is not None:
        fetched, num_uses, last_used_at = name.fetched, name.num_uses, name.last_used_at
        is_pinned = name.is_pinned and record is not None and record.is_pinned
    elif entry is not None and record is not None:
        is_pinned, num_uses, last_used_at = record.is_pinned, record.num_uses, entry.last_used_at
    return {
        "adapter_id": row.ref.id,
        "adapter_source": row.ref.source,
        "revision": row.ref.revision,
        "alias_of": None if row.alias is None else str(row.alias.target.refs[0]),
        "version": None if fetched is None else fetched.version,
        "rank": None if fetched is None else fetched.max_rank,
        "state": row.state,
        "pinned": is_pinned,
        "content_digest": None if content is None else content.key,
        "bytes": bytes_of(None if record is None else record.handle, content, tiers),
        "waiting": 0 if record is None else record.num_waiting,
        "running": 0 if record is None else record.num_running,
        "uses": num_uses,
        "last_used": last_used_at,
        "warnings": [] if fetched is None else list(fetched.warnings),
        "failure": None
        if failure is None
        else {"reason": failure.reason.value, "text": failure.text},
    }
