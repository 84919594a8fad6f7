"""What callers are told of adapters: pages of the list, one adapter as the list has it, and names.

A private adapter is there for callers with a token that its source accepts. Whether a token still
opens what it opened before, sources are asked again before a page says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from lorax_contract.adapters import AdapterQuery, AdapterTiers
from lorax_contract.errors import AdapterNotLoadedError
from lorax_contract.step import AdapterHandle
from lorax_router.core.ports import ShardClient
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.adapters.listing import (
    LARGEST_PAGE,
    AdapterListing,
    Document,
    ListedAdapter,
    ListQuery,
    Page,
    Viewer,
    document_of,
)
from lorax_router.service.adapters.names import KnownName
from lorax_router.service.adapters.tokens import TenantTokens
from lorax_router.service.callers import OPERATOR, Caller

# How long a list waits for sources to say whether a token still opens what it opened before.
_CONFIRM_S = 5.0
# Documents that are made before others get the loop.
_AT_ONCE = 50


class AdapterPages:
    """Writes them; answers are documents as JSON has them.

    Args:
        directory: what is known of adapters.
        shards: say where they lie.
        tokens: those that tenants have shown.
    """

    def __init__(
        self, directory: AdapterDirectory, shards: ShardClient, tokens: TenantTokens
    ) -> None:
        self._directory = directory
        self._shards = shards
        self._tokens = tokens
        self._names = directory.catalog.names
        self._list = AdapterListing(directory.catalog, directory.aliases)

    def name_of(self, handle: AdapterHandle, caller: Caller) -> str | None:
        """Return what a caller may call an adapter that is in use; None: private, or not theirs."""
        return self._list.name_of(handle, Viewer(caller))

    async def document(self, selection: AdapterSelection) -> Document:
        """Return one adapter as the list has it; AdapterNotLoadedError if it is gone."""
        name = self._names.find(selection.refs[0])
        viewer = Viewer(OPERATOR, self._names.scopes(selection.token))
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
        viewer = Viewer(caller, self._names.scopes(*tokens))
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
        viewer = Viewer(caller, self._names.scopes(*tokens))
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

    async def _confirm(
        self, rows: Sequence[ListedAdapter], tokens: Sequence[str], seconds: float = _CONFIRM_S
    ) -> None:
        """Ask sources again that let this caller in some time ago, for a while."""
        by_scope = {self._names.scope_of(token): token for token in tokens}
        fetch = self._directory.fetch
        old = [
            asyncio.ensure_future(
                fetch(AdapterQuery(ref=row.ref, token=by_scope.get(row.view.scope)))
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
        return not self._names.holds(row.view)
