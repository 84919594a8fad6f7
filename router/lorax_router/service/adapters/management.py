"""Adapters by hand: load, unload, pin, reload, list.

Who may do what with which adapter is decided here and nowhere above: a private one is there for
callers with a token that its source accepts, one out of a tenant's bounds for other tenants, and
both are unknown to all others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from lorax_contract.adapters import (
    ALIAS_SOURCE,
    AdapterQuery,
    AdapterRef,
    AdapterTiers,
    AdapterUnavailableError,
)
from lorax_contract.errors import AdapterNotLoadedError, QuotaError, ValidationError
from lorax_contract.step import AdapterHandle
from lorax_contract.words import counted
from lorax_router.core.ports import ShardClient
from lorax_router.service.adapters.aliases import Alias
from lorax_router.service.adapters.catalog import AdapterSelection, CatalogEntry, not_loaded
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.adapters.listing import (
    LARGEST_PAGE,
    AdapterListing,
    Document,
    ListedAdapter,
    ListQuery,
    Page,
    Viewer,
    bytes_of,
    document_of,
)
from lorax_router.service.adapters.names import KnownName
from lorax_router.service.adapters.registry import AdapterRegistry
from lorax_router.service.adapters.tokens import TenantTokens
from lorax_router.service.callers import OPERATOR, Caller
from lorax_router.service.keys.meters import Meters

# How long a list waits for sources to say whether a token still opens what it opened before.
_CONFIRM_S = 5.0
# When it makes sense to pin again where only the tenant itself can make place.
_PIN_RETRY_S = 60
# Documents that are made before others get the loop.
_AT_ONCE = 50


class AdapterManager:
    """What an operator does with adapters; answers are documents as JSON has them."""

    def __init__(
        self,
        directory: AdapterDirectory,
        shards: ShardClient,
        meters: Meters | None = None,
        tokens: TenantTokens | None = None,
        registry: AdapterRegistry | None = None,
    ) -> None:
        # What the next server is to know.
        self.registry = registry or AdapterRegistry()
        self._meters = meters or Meters()
        self._tokens = tokens or TenantTokens()
        self.directory = directory
        self._catalog = directory.catalog
        self._list = AdapterListing(directory.catalog, directory.aliases)
        self._shards = shards

    async def load(
        self,
        selection: AdapterSelection,
        caller: Caller = OPERATOR,
        *,
        pin: bool = False,
        remember: bool = True,
    ) -> Document:
        """Have an adapter on the shards before a request asks for it, and keep it if pinned.

        Its source is asked whatever was remembered of it. With ``remember`` the next server has it
        loaded, too.
        """
        caller.check_sees(selection.refs)
        meter, begun_at = self._meters.of(caller), time.time()
        lease = await self.directory.acquire(selection, refresh=True, meter=meter)
        selection = self.directory.plain(selection)
        try:
            entry = self._catalog.by_handle[lease.handle]
            if lease.is_private:
                self._tokens.opened(caller, selection.token)
            await self._bring(entry, selection, caller if pin else None)
        finally:
            lease.release()
        if remember:
            pinned_by, is_private = caller if pin else None, lease.is_private
            await self._remember(selection, pinned_by, is_private=is_private, at=begun_at)
        return await self._document(selection)

    async def _remember(
        self, selection: AdapterSelection, pinned_by: Caller | None, *, is_private: bool, at: float
    ) -> None:
        """Remember what is loaded, by when its source was asked: Unix time."""
        ref = selection.refs[0]
        if selection.merge is not None:
            return  # no name leads to it
        if pinned_by is not None:
            await self.registry.pinned(ref, pinned_by.tenant, is_private=is_private, at=at)
        elif is_private:
            await self.registry.reloaded(ref, at)
        else:
            await self.registry.loaded(ref, at)

    async def name(
        self,
        alias: Alias,
        caller: Caller = OPERATOR,
        *,
        pin: bool = False,
        in_place: bool = True,
    ) -> Document:
        """Let a name stand for an adapter, which is on the shards then, and pinned if asked for.

        What the name led to before serves the requests that use it, and goes. Nothing changes
        if the adapter cannot be had, or, without ``in_place``, if there is such a name already.
        """
        # A name must not lead a tenant out of its bounds.
        caller.check_sees([alias.ref, *alias.target.refs])
        self._check_free(alias, in_place=in_place)
        meter, begun_at = self._meters.of(caller), time.time()
        fetched = await self.directory.fetch_target(alias, meter, refresh=True)
        await self.directory.check_text(alias, fetched)
        entry = self._catalog.place(alias.target, [fetched])
        with self._held(entry):
            await self._catalog.engine.load_adapter(entry.handle)
            self._check_free(alias, in_place=in_place)
            self.directory.aliases.put(alias)
            self._catalog.names.answered(alias.ref, None, fetched, begun_at)
            self._catalog.place(alias.selection, [fetched])
            if pin:
                await self._bring(entry, alias.selection, caller)
        await self.registry.named(alias)
        pinned_by = caller if pin else None
        await self._remember(alias.selection, pinned_by, is_private=False, at=begun_at)
        return await self._document(alias.selection)

    def _check_free(self, alias: Alias, *, in_place: bool) -> None:
        if not in_place and self.directory.aliases.find(alias.name) is not None:
            raise ValidationError(
                f"the lora adapter '{alias.name}' has already been loaded; set `load_inplace` to let "
                "the name stand for another one"
            )

    async def pin(self, selection: AdapterSelection, caller: Caller = OPERATOR) -> Document:
        """Keep an adapter that is known on the shards; AdapterNotLoadedError if it is not."""
        selection = self.directory.plain(selection)
        name, entry = await self._required(selection, caller)
        self._check_pins(name, caller)
        begun_at = time.time()
        with self._held(entry):
            await self._bring(entry, selection, caller)
        await self._remember(selection, caller, is_private=not name.is_public, at=begun_at)
        return await self._document(selection)

    async def unpin(self, selection: AdapterSelection, caller: Caller = OPERATOR) -> Document:
        """Let an adapter be evicted again, as far as it depends on this caller's tenant.

        An admin lets it go for all. AdapterNotLoadedError if the name is not known.
        """
        selection = self.directory.plain(selection)
        if caller.is_admin:
            # Also if it is not here: servers that are away may have it.
            await self.registry.unpinned(selection.refs[0], None)
        name, entry = await self._required(selection, caller)
        self._unpin(name, entry, {*name.pinned_by} if caller.is_admin else {caller.tenant})
        if not caller.is_admin:
            await self.registry.unpinned(selection.refs[0], caller.tenant)
        return await self._document(selection)

    def unpin_elsewhere(self, ref: AdapterRef, tenant: str) -> None:
        """Let a tenant's pin go that was taken back at another server."""
        name = self._named(ref)
        if name is not None and (entry := self._catalog.entry_of(name)) is not None:
            self._unpin(name, entry, {tenant})

    def _unpin(self, name: KnownName, entry: CatalogEntry, tenants: set[str]) -> None:
        name.pinned_by -= tenants
        if not self._catalog.is_pinned(entry):
            self._catalog.engine.unpin_adapter(entry.handle)

    async def reload(self, selection: AdapterSelection, caller: Caller = OPERATOR) -> Document:
        """Ask the source of a name anew; requests under way finish with what they have.

        A pin goes over to what the name leads to now. If the source does not answer well,
        everything stays as it was, and the list says why.
        """
        selection = self.directory.plain(selection)
        ref = selection.refs[0]
        if not caller.sees(ref):
            raise not_loaded(ref)
        # Also if it is not here: servers that are away may have it.
        await self.registry.reloaded(ref)
        name = self._catalog.names.find(ref)
        if name is None or self._catalog.names.any_view(name, selection.token) is None:
            raise not_loaded(ref)
        before = name.content_key
        query = AdapterQuery(ref=ref, token=selection.token, refresh=True)
        fetched = await self.directory.fetch(query)
        entry = self._catalog.place(selection, [fetched])
        if self._catalog.is_pinned(entry):
            with self._held(entry):
                await self._catalog.engine.load_adapter(entry.handle)
        return {**await self._document(selection), "changed": before != entry.content.key}

    async def unload(self, selection: AdapterSelection, caller: Caller = OPERATOR) -> Document:
        """Free an adapter in every tier, once the requests that use it are done.

        Requests that come after this call ask its source anew. What other adapters share
        with it stays. Goes on when the caller leaves.
        """
        selection = self.directory.plain(selection)
        ref = selection.refs[0]
        if not caller.sees(ref):
            raise not_loaded(ref)
        alias = self.directory.aliases.drop(ref.id) if ref.source == ALIAS_SOURCE else None
        # Also if it is not here: servers that are away may have it.
        noting = self.directory.start(self.registry.unloaded(ref))
        freed = {"device": 0, "host": 0, "disk": 0}
        shared_with: list[str] = []
        try:
            name, entry = await self._required(selection, caller)
        except AdapterNotLoadedError:
            # A name may be there whose adapter never was, or was forgotten.
            if alias is None:
                await asyncio.shield(noting)
                raise
            if (known := self._catalog.names.find(ref)) is not None:
                self._catalog.forget(known)
        else:
            others = await self._unload(name, entry, selection, alias, freed)
            shared_with = [str(other) for other in others if caller.sees(other)]
        await asyncio.shield(noting)
        return {
            "adapter_id": ref.id,
            "adapter_source": ref.source,
            "revision": ref.revision,
            "state": "unloaded",
            "freed": freed,
            "shared_with": shared_with,
        }

    def expire(self, ref: AdapterRef, until: float) -> None:
        """Have an adapter's source asked anew, where it was asked up to a Unix time."""
        if (name := self._named(ref)) is not None:
            self._catalog.names.expire(name, until)

    async def unload_elsewhere(self, ref: AdapterRef, at: float) -> None:
        """Free an adapter that was unloaded at another server, unless its source was asked since.

        Whoever may use it: nobody has to know of it. ``at`` is Unix time.
        """
        name = self._named(ref)
        if name is None or not self._catalog.names.expire(name, at):
            return
        if (entry := self._catalog.entry_of(name)) is None:
            self._catalog.forget(name)
        else:
            await self._unload(name, entry, AdapterSelection(refs=(name.ref,)), None, {})

    def _named(self, ref: AdapterRef) -> KnownName | None:
        (plain,) = self.directory.plain(AdapterSelection(refs=(ref,))).refs
        return self._catalog.names.find(plain)

    async def _unload(
        self,
        name: KnownName,
        entry: CatalogEntry,
        selection: AdapterSelection,
        alias: Alias | None,
        freed: dict[str, int],
    ) -> list[AdapterRef]:
        """Forget a name, and free what no other leads to; returns the others."""
        self._catalog.forget(name)
        if alias is not None and entry.selection.refs == selection.refs:
            # What has left the disk is fetched again by what the name stood for.
            entry.selection = alias.target
        if not entry.names:
            self._catalog.detach(entry)
            await asyncio.shield(self.directory.start(self._free(entry, freed)))
        others = (
            other.ref
            for other in entry.names.values()
            if self._catalog.names.good_view(other, selection.token) is not None
        )
        return sorted(others, key=str)

    async def _free(self, entry: CatalogEntry, freed: dict[str, int]) -> None:
        parts = entry.content.parts
        before = bytes_of(entry.handle, entry.content, await self._shards.adapter_tiers(parts))
        await self.directory.gone(entry)
        await self.directory.forget_files(entry)
        after = bytes_of(entry.handle, entry.content, await self._shards.adapter_tiers(parts))
        freed.update({tier: before[tier] - after[tier] for tier in before})

    async def _bring(
        self, entry: CatalogEntry, selection: AdapterSelection, pinned_by: Caller | None
    ) -> None:
        engine, pin = self._catalog.engine, pinned_by is not None
        try:
            await engine.load_adapter(entry.handle, pin=pin)
            if pinned_by is not None:
                ref = selection.refs[0]
                name, _, found = self._catalog.require(ref, selection.token)
                if found is not entry:
                    raise AdapterNotLoadedError(
                        f"adapter {ref} was replaced while it was loaded; send it again"
                    )
                self._check_pins(name, pinned_by)
                name.pinned_by.add(pinned_by.tenant)
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

    def _check_pins(self, name: KnownName, caller: Caller) -> None:
        """Raise QuotaError when a tenant keeps as many adapters as it may."""
        if caller.is_admin or caller.tenant in name.pinned_by:
            return
        pinned = sum(caller.tenant in each.pinned_by for each in self._catalog.names)
        if pinned >= caller.quotas.pins:
            raise QuotaError(
                f"the quota of {counted(caller.quotas.pins, 'pin')} is used up; unpin an adapter "
                "first",
                retry_after_s=_PIN_RETRY_S,
            )

    async def _required(
        self, selection: AdapterSelection, caller: Caller
    ) -> tuple[KnownName, CatalogEntry]:
        """Return a name and what it leads to; AdapterNotLoadedError, also if it is hidden.

        Whether a token is still accepted is asked for when the last answer is old.
        """
        ref, token = selection.refs[0], selection.token
        if not caller.sees(ref):
            raise not_loaded(ref)
        name, view, entry = self._catalog.require(ref, token)
        if name.is_public or self._catalog.names.holds(view):
            return name, entry
        try:
            await self.directory.fetch(AdapterQuery(ref=ref, token=token))
        except AdapterUnavailableError as error:
            if not error.reason.permanent:
                raise
        name, _, entry = self._catalog.require(ref, token)
        return name, entry

    async def _confirm(
        self, rows: Sequence[ListedAdapter], tokens: Sequence[str], seconds: float = _CONFIRM_S
    ) -> None:
        """Ask sources again that let this caller in some time ago, for a while."""
        by_scope = {self._catalog.names.scope_of(token): token for token in tokens}
        old = [
            asyncio.ensure_future(
                self.directory.fetch(AdapterQuery(ref=row.ref, token=by_scope.get(row.view.scope)))
            )
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

    def name_of(self, handle: AdapterHandle, caller: Caller) -> str | None:
        """Return what a caller may call an adapter that is in use; None: private, or not theirs."""
        return self._list.name_of(handle, Viewer(caller))

    def place_keys(self, handles: Iterable[AdapterHandle]) -> list[str]:
        """Return what ``place_key`` may call some adapters, private ones included; each once."""
        entries = [self._catalog.by_handle.get(handle) for handle in handles]
        return self.directory.keys_of(entry for entry in entries if entry is not None)

    async def hosted_keys(self, most: int) -> list[str]:
        """Return the same of adapters in the shards' host memory that are not on the device.

        Of those that were used latest; so many are looked at.
        """
        entries = self._catalog.recently_held(most)
        parts = dict.fromkeys(part for entry in entries for part in entry.content.parts)
        host = (await self._shards.adapter_tiers([*parts])).host
        return self.directory.keys_of(
            entry for entry in entries
            if all(part.content_digest in host for part in entry.content.parts)
        )  # fmt: skip

    async def _document(self, selection: AdapterSelection) -> Document:
        """Return one adapter as the list has it; AdapterNotLoadedError if it is gone."""
        name = self._catalog.names.find(selection.refs[0])
        viewer = Viewer(OPERATOR, self._catalog.names.scopes(selection.token))
        row = self._list.row(name, viewer) if name is not None else None
        if row is None:
            raise AdapterNotLoadedError(f"adapter {selection.refs[0]} was unloaded meanwhile")
        return document_of(row, await self._tiers([row]))

    async def _tiers(self, rows: Sequence[ListedAdapter]) -> AdapterTiers:
        """Ask the shards for what is on a page and nothing else."""
        contents = [row.content for row in rows if row.content is not None]
        parts = dict.fromkeys(part for content in contents for part in content.parts)
        return await self._shards.adapter_tiers([*parts])

    async def listing(
        self, query: ListQuery, token: str | None = None, caller: Caller = OPERATOR
    ) -> Document:
        """Return a page of the adapters that a caller may see, with state and bytes per tier.

        Behind the names come merges, and what a name led to and is still in use (retiring).
        """
        tokens = self._tokens.of(caller, token)
        viewer = Viewer(caller, self._catalog.names.scopes(*tokens))
        page = await self._page(query, viewer)
        if any(self._is_old(row) for row in page.rows):
            await self._confirm(page.rows, tokens)
        tiers = await self._tiers(page.rows)
        documents: list[Document] = []
        for row in page.rows:
            # Some things may have changed since the page was chosen.
            now = row if row.name is None else self._list.row(row.name, viewer)
            if now is not None and not self._is_old(now):
                documents.append(document_of(now, tiers))
            if len(documents) % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return {"adapters": documents, "next_cursor": page.next_cursor}

    async def _page(self, query: ListQuery, viewer: Viewer) -> Page:
        """Return a page; a tenant's is full, so that no cursor has to tell of others' names."""
        page = self._list.page(query, viewer)
        while viewer.caller.has_key and page.resume is not None:
            await asyncio.sleep(0)
            rest = replace(query, cursor=page.resume, limit=query.limit - len(page.rows))
            more = self._list.page(rest, viewer)
            page = more._replace(rows=page.rows + more.rows)
        return page

    async def usable(self, token: str | None = None, caller: Caller = OPERATOR) -> list[KnownName]:
        """Return the names by which a caller may use adapters now, aliases aside."""
        tokens = self._tokens.of(caller, token)
        viewer = Viewer(caller, self._catalog.names.scopes(*tokens))
        loop = asyncio.get_running_loop()
        until = loop.time() + _CONFIRM_S
        names: list[KnownName] = []
        query: ListQuery | None = ListQuery(limit=LARGEST_PAGE)
        while query is not None:
            page = self._list.page(query, viewer)
            if any(self._is_old(row) for row in page.rows) and loop.time() < until:
                await self._confirm(page.rows, tokens, until - loop.time())
            for row in page.rows:
                now = self._list.row(row.name, viewer) if row.name is not None else None
                if now is None or now.name is None or now.alias is not None or self._is_old(now):
                    continue
                if now.entry is not None:
                    names.append(now.name)
            following = page.next_cursor
            query = ListQuery(limit=LARGEST_PAGE, cursor=following) if following else None
            await asyncio.sleep(0)
        return names

    async def known(self, selection: AdapterSelection, caller: Caller = OPERATOR) -> KnownName:
        """Return a name that a caller may use and that is known; else AdapterNotLoadedError."""
        name, _ = await self._required(self.directory.plain(selection), caller)
        return name
