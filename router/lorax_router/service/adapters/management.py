"""Adapters by hand: load, unload, pin, reload, list.

Who may do what is decided here and nowhere above: a private adapter is there for callers with
a token that its source accepts, and unknown to all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lorax_contract.adapters import (
    ALIAS_SOURCE,
    AdapterQuery,
    AdapterTiers,
    AdapterUnavailableError,
)
from lorax_contract.errors import AdapterNotLoadedError, ValidationError
from lorax_router.core.ports import ShardClient
from lorax_router.service.adapters.aliases import Alias
from lorax_router.service.adapters.catalog import AdapterSelection, CatalogEntry, not_loaded
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.adapters.listing import (
    LARGEST_PAGE,
    AdapterList,
    Document,
    ListedAdapter,
    ListQuery,
    bytes_of,
    document_of,
)
from lorax_router.service.adapters.names import KnownName

# How long a list waits for sources to say whether a token still opens what it opened before.
_CONFIRM_S = 5.0
# Documents that are made before others get the loop.
_AT_ONCE = 50


class AdapterManager:
    """What an operator does with adapters; answers are documents as JSON has them."""

    def __init__(self, directory: AdapterDirectory, shards: ShardClient) -> None:
        self._directory = directory
        self._catalog = directory.catalog
        self._list = AdapterList(directory.catalog, directory.aliases)
        self._shards = shards

    async def load(self, selection: AdapterSelection, *, pin: bool = False) -> Document:
        """Have an adapter on the shards before a request asks for it, and keep it if pinned.

        Its source is asked whatever was remembered of it.
        """
        lease = await self._directory.acquire(selection, refresh=True)
        selection = self._directory.plain(selection)
        try:
            entry = self._catalog.by_handle[lease.handle]
            await self._bring(entry, selection, pin=pin)
        finally:
            lease.release()
        return await self._document(selection)

    async def name(self, alias: Alias, *, pin: bool = False, in_place: bool = True) -> Document:
        """Let a name stand for an adapter, which is on the shards then, and pinned if asked for.

        What the name led to before serves the requests that use it, and goes. Nothing changes
        if the adapter cannot be had, or, without ``in_place``, if there is such a name already.
        """
        self._check_free(alias, in_place=in_place)
        fetched = await self._directory.fetch_target(alias, refresh=True)
        await self._directory.check_text(alias, fetched)
        entry = self._catalog.place(alias.target, [fetched])
        with self._held(entry):
            await self._catalog.engine.load_adapter(entry.handle)
            self._check_free(alias, in_place=in_place)
            self._directory.aliases.put(alias)
            self._catalog.names.answered(alias.ref, None, fetched)
            self._catalog.place(alias.selection, [fetched])
            if pin:
                await self._bring(entry, alias.selection, pin=True)
        return await self._document(alias.selection)

    def _check_free(self, alias: Alias, *, in_place: bool) -> None:
        if not in_place and self._directory.aliases.find(alias.name) is not None:
            raise ValidationError(
                f"the lora adapter '{alias.name}' has already been loaded; set `load_inplace` to let "
                "the name stand for another one"
            )

    async def pin(self, selection: AdapterSelection) -> Document:
        """Keep an adapter that is known on the shards; AdapterNotLoadedError if it is not."""
        selection = self._directory.plain(selection)
        _, entry = await self._required(selection)
        with self._held(entry):
            await self._bring(entry, selection, pin=True)
        return await self._document(selection)

    async def unpin(self, selection: AdapterSelection) -> Document:
        """Let an adapter be evicted again; AdapterNotLoadedError if the name is not known."""
        selection = self._directory.plain(selection)
        name, entry = await self._required(selection)
        name.is_pinned = False
        if not self._catalog.is_pinned(entry):
            self._catalog.engine.unpin_adapter(entry.handle)
        return await self._document(selection)

    async def reload(self, selection: AdapterSelection) -> Document:
        """Ask the source of a name anew; requests under way finish with what they have.

        A pin goes over to what the name leads to now. If the source does not answer well,
        everything stays as it was, and the list says why.
        """
        selection = self._directory.plain(selection)
        ref = selection.refs[0]
        name = self._catalog.names.find(ref)
        if name is None or self._catalog.names.any_view(name, selection.token) is None:
            raise not_loaded(ref)
        before = name.content_key
        query = AdapterQuery(ref=ref, token=selection.token, refresh=True)
        fetched = await self._directory.fetch(query)
        entry = self._catalog.place(selection, [fetched])
        if self._catalog.is_pinned(entry):
            with self._held(entry):
                await self._catalog.engine.load_adapter(entry.handle)
        return {**await self._document(selection), "changed": before != entry.content.key}

    async def unload(self, selection: AdapterSelection) -> Document:
        """Free an adapter in every tier, once the requests that use it are done.

        Requests that come after this call ask its source anew. What other adapters share
        with it stays. Goes on when the caller leaves.
        """
        selection = self._directory.plain(selection)
        ref = selection.refs[0]
        alias = self._directory.aliases.drop(ref.id) if ref.source == ALIAS_SOURCE else None
        freed = {"device": 0, "host": 0, "disk": 0}
        shared_with: list[str] = []
        try:
            name, entry = await self._required(selection)
        except AdapterNotLoadedError:
            # A name may be there whose adapter never was, or was forgotten.
            if alias is None:
                raise
            if (known := self._catalog.names.find(ref)) is not None:
                self._catalog.forget(known)
        else:
            shared_with = await self._unload(name, entry, selection, alias, freed)
        return {
            "adapter_id": ref.id,
            "adapter_source": ref.source,
            "revision": ref.revision,
            "state": "unloaded",
            "freed": freed,
            "shared_with": shared_with,
        }

    async def _unload(
        self,
        name: KnownName,
        entry: CatalogEntry,
        selection: AdapterSelection,
        alias: Alias | None,
        freed: dict[str, int],
    ) -> list[str]:
        """Forget a name, and free what no other leads to; returns the others."""
        self._catalog.forget(name)
        if alias is not None and entry.selection.refs == selection.refs:
            # What has left the disk is fetched again by what the name stood for.
            entry.selection = alias.target
        if not entry.names:
            self._catalog.detach(entry)
            await asyncio.shield(self._directory.start(self._free(entry, freed)))
        return sorted(
            str(other.ref)
            for other in entry.names.values()
            if self._catalog.names.good_view(other, selection.token) is not None
        )

    async def _free(self, entry: CatalogEntry, freed: dict[str, int]) -> None:
        parts = entry.content.parts
        before = bytes_of(entry.handle, entry.content, await self._shards.adapter_tiers(parts))
        await self._directory.gone(entry)
        await self._directory.forget_files(entry)
        after = bytes_of(entry.handle, entry.content, await self._shards.adapter_tiers(parts))
        freed.update({tier: before[tier] - after[tier] for tier in before})

    async def _bring(self, entry: CatalogEntry, selection: AdapterSelection, *, pin: bool) -> None:
        engine = self._catalog.engine
        try:
            await engine.load_adapter(entry.handle, pin=pin)
            if pin:
                ref = selection.refs[0]
                name, _, found = self._catalog.require(ref, selection.token)
                if found is not entry:
                    raise AdapterNotLoadedError(
                        f"adapter {ref} was replaced while it was loaded; send it again"
                    )
                name.is_pinned = True
        except BaseException:
            # A pin without a name could not be taken back.
            if pin and not self._catalog.is_pinned(entry):
                engine.unpin_adapter(entry.handle)
            raise

    @contextmanager
    def _held(self, entry: CatalogEntry) -> Iterator[None]:
        self._catalog.hold(entry)
        try:
            yield
        finally:
            self._catalog.let_go(entry)

    # --- who may ------------------------------------------------------------------

    async def _required(self, selection: AdapterSelection) -> tuple[KnownName, CatalogEntry]:
        """Return a name and what it leads to; AdapterNotLoadedError, also if it is hidden.

        Whether a token is still accepted is asked for when the last answer is old.
        """
        ref, token = selection.refs[0], selection.token
        name, view, entry = self._catalog.require(ref, token)
        if name.is_public or self._catalog.names.holds(view):
            return name, entry
        try:
            await self._directory.fetch(AdapterQuery(ref=ref, token=token))
        except AdapterUnavailableError as error:
            if not error.reason.permanent:
                raise
        name, _, entry = self._catalog.require(ref, token)
        return name, entry

    async def _confirm(
        self, rows: Sequence[ListedAdapter], token: str | None, seconds: float = _CONFIRM_S
    ) -> None:
        """Ask sources again that let this caller in some time ago, for a while."""
        old = [
            asyncio.ensure_future(self._directory.fetch(AdapterQuery(ref=row.ref, token=token)))
            for row in rows
            if row.view is not None and self._is_old(row)
        ]
        if old:
            await asyncio.wait(old, timeout=seconds)
            for task in old:
                task.cancel()
            await asyncio.gather(*old, return_exceptions=True)

    def _is_old(self, row: ListedAdapter) -> bool:
        """Whether a caller may have lost the access that a line was shown for."""
        if row.view is None or row.view.fetched is None or (row.name and row.name.is_public):
            return False
        return not self._catalog.names.holds(row.view)

    # --- facts --------------------------------------------------------------------

    async def _document(self, selection: AdapterSelection) -> Document:
        """Return one adapter as the list has it; AdapterNotLoadedError if it is gone."""
        name = self._catalog.names.find(selection.refs[0])
        row = self._list.row(name, selection.token) if name is not None else None
        if row is None:
            raise AdapterNotLoadedError(f"adapter {selection.refs[0]} was unloaded meanwhile")
        return document_of(row, await self._tiers([row]))

    async def _tiers(self, rows: Sequence[ListedAdapter]) -> AdapterTiers:
        """Ask the shards for what is on a page and nothing else."""
        contents = [row.content for row in rows if row.content is not None]
        parts = dict.fromkeys(part for content in contents for part in content.parts)
        return await self._shards.adapter_tiers([*parts])

    async def listing(self, query: ListQuery, token: str | None = None) -> Document:
        """Return a page of the adapters that a caller may see, with state and bytes per tier.

        Behind the names come merges, and what a name led to and is still in use (retiring).
        """
        page = self._list.page(query, token)
        if any(self._is_old(row) for row in page.rows):
            await self._confirm(page.rows, token)
        tiers = await self._tiers(page.rows)
        documents: list[Document] = []
        for row in page.rows:
            # Some things may have changed since the page was chosen.
            now = row if row.name is None else self._list.row(row.name, token)
            if now is not None and not self._is_old(now):
                documents.append(document_of(now, tiers))
            if len(documents) % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return {"adapters": documents, "next_cursor": page.next_cursor}

    async def usable(self, token: str | None = None) -> list[KnownName]:
        """Return the names by which a caller may use adapters now, aliases aside."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _CONFIRM_S
        names: list[KnownName] = []
        query: ListQuery | None = ListQuery(limit=LARGEST_PAGE)
        while query is not None:
            page = self._list.page(query, token)
            if any(self._is_old(row) for row in page.rows) and loop.time() < until:
                await self._confirm(page.rows, token, until - loop.time())
            for row in page.rows:
                now = self._list.row(row.name, token) if row.name is not None else None
                if now is None or now.name is None or now.alias is not None or self._is_old(now):
                    continue
                if now.entry is not None:
                    names.append(now.name)
            following = page.next_cursor
            query = ListQuery(limit=LARGEST_PAGE, cursor=following) if following else None
            await asyncio.sleep(0)
        return names

    async def known(self, selection: AdapterSelection) -> KnownName:
        """Return a name that a caller may use and that is known; else AdapterNotLoadedError."""
        name, _ = await self._required(self._directory.plain(selection))
        return name
