"""Adapters by hand: load, unload, pin, reload, list."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from lorax_contract.adapters import AdapterQuery, AdapterRef
from lorax_contract.errors import AdapterNotLoadedError
from lorax_router.core.ports import ShardClient
from lorax_router.service.adapters.catalog import AdapterSelection, CatalogEntry
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.adapters.listing import (
    Document,
    bytes_of,
    name_document,
    nameless_document,
    shard_state_of,
)


class AdapterManager:
    """What an operator does with adapters; answers are documents as JSON has them."""

    def __init__(self, directory: AdapterDirectory, shards: ShardClient) -> None:
        self._directory = directory
        self._catalog = directory.catalog
        self._shards = shards

    async def load(self, selection: AdapterSelection, *, pin: bool = False) -> Document:
        """Have an adapter on the shards before a request asks for it, and keep it if pinned."""
        lease = await self._directory.acquire(selection)
        try:
            entry = self._catalog.by_handle[lease.handle]
            await self._bring(entry, selection.refs[0], pin=pin)
        finally:
            lease.release()
        return await self.document(selection.refs[0])

    async def pin(self, ref: AdapterRef) -> Document:
        """Keep an adapter that is known on the shards; AdapterNotLoadedError if it is not."""
        _, entry = self._catalog.require(ref)
        with self._held(entry):
            await self._bring(entry, ref, pin=True)
        return await self.document(ref)

    async def unpin(self, ref: AdapterRef) -> Document:
        """Let an adapter be evicted again; AdapterNotLoadedError if the name is not known."""
        name, entry = self._catalog.require(ref)
        name.is_pinned = False
        if not self._catalog.is_pinned(entry):
            self._catalog.engine.unpin_adapter(entry.handle)
        return await self.document(ref)

    async def reload(self, selection: AdapterSelection) -> Document:
        """Ask the source of a name anew; requests under way finish with what they have.

        A pin goes over to what the name leads to now.
        """
        ref = selection.refs[0]
        name = self._catalog.find(ref)
        if name is None:
            name, _ = self._catalog.require(ref)
        before = name.content_key
        self._directory.forget_answers(ref)
        query = AdapterQuery(ref=ref, token=selection.token, refresh=True)
        fetched = await self._directory.fetch(query)
        entry = self._catalog.place(selection, [fetched])
        if self._catalog.is_pinned(entry):
            with self._held(entry):
                await self._catalog.engine.load_adapter(entry.handle)
        return {**await self.document(ref), "changed": before != entry.content.key}

    async def unload(self, ref: AdapterRef) -> Document:
        """Free an adapter in every tier, once the requests that use it are done.

        Requests that come after this call fetch it anew. What other adapters share with
        it stays. Goes on when the caller leaves.
        """
        name, entry = self._catalog.require(ref)
        self._directory.forget_answers(ref)
        freed = {"device": 0, "host": 0, "disk": 0}
        self._catalog.forget(name)
        shared = sorted(entry.names)
        if not shared:
            self._catalog.detach(entry)
            await asyncio.shield(self._directory.start(self._free(entry, freed)))
        return {
            "adapter_id": ref.id,
            "adapter_source": ref.source,
            "revision": ref.revision,
            "state": "unloaded",
            "freed": freed,
            "shared_with": shared,
        }

    async def _free(self, entry: CatalogEntry, freed: dict[str, int]) -> None:
        before = bytes_of(entry.handle, entry.content, await self._shards.adapter_tiers())
        await self._directory.gone(entry)
        await self._directory.forget_files(entry)
        after = bytes_of(entry.handle, entry.content, await self._shards.adapter_tiers())
        freed.update({tier: before[tier] - after[tier] for tier in before})

    async def _bring(self, entry: CatalogEntry, ref: AdapterRef, *, pin: bool) -> None:
        engine = self._catalog.engine
        try:
            await engine.load_adapter(entry.handle, pin=pin)
            if pin:
                name, found = self._catalog.require(ref)
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

    # --- facts --------------------------------------------------------------------

    async def document(self, ref: AdapterRef) -> Document:
        """Return one adapter as the list has it; AdapterNotLoadedError if it is not known."""
        tiers = await self._shards.adapter_tiers()
        for name, entry, record in self._catalog.records():
            if name.ref == ref:
                return name_document(name, record, entry.content if entry else None, tiers)
        raise AdapterNotLoadedError(f"adapter {ref} was unloaded meanwhile")

    async def listing(self) -> list[Document]:
        """Return all known adapters with their state and bytes per tier.

        Behind the names come merges, and what a name led to and is still in use (retiring).
        """
        tiers = await self._shards.adapter_tiers()
        listed = [
            name_document(name, record, entry.content if entry else None, tiers)
            for name, entry, record in self._catalog.records()
        ]
        for entry, record in self._catalog.nameless():
            listed.append(
                nameless_document(
                    entry.label,
                    entry.selection.refs[0].source,
                    "retiring" if entry.is_leaving else shard_state_of(record),
                    record,
                    entry.content,
                    tiers,
                    num_uses=entry.num_uses,
                    last_used_at=entry.last_used_at,
                )
            )
        return listed
