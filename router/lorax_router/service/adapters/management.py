"""Adapters by hand: load, unload, pin, reload.

Who may do what with which adapter is decided here and nowhere above: a private one is there for
callers with a token that its source accepts, one out of a tenant's bounds for other tenants, and
both are unknown to all others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from lorax_contract.adapters import (
    ALIAS_SOURCE,
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
)
from lorax_contract.errors import AdapterNotLoadedError, QuotaError, ValidationError
from lorax_contract.step import AdapterHandle
from lorax_contract.words import counted
from lorax_router.core.ports import ShardClient
from lorax_router.service.adapters.aliases import Alias
from lorax_router.service.adapters.catalog import AdapterSelection, CatalogEntry, not_loaded
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.adapters.listing import Document, bytes_of
from lorax_router.service.adapters.managed import ManagedChange, ManagedKind, Stamp, Taken
from lorax_router.service.adapters.names import KnownName
from lorax_router.service.adapters.pages import AdapterPages
from lorax_router.service.adapters.registry import AdapterRegistry
from lorax_router.service.adapters.tokens import TenantTokens
from lorax_router.service.callers import OPERATOR, Caller
from lorax_router.service.keys.meters import Meters

# When it makes sense to pin again where only the tenant itself can make place.
_PIN_RETRY_S = 60


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
        self.pages = AdapterPages(directory, shards, self._tokens)
        self._catalog = directory.catalog
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
        stamp, meter = self.registry.stamp(), self._meters.of(caller)
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
            pinned_by = caller if pin else None
            await self._keep(selection, stamp, pinned_by, is_private=lease.is_private)
        return await self.pages.document(selection)

    async def _keep(
        self,
        selection: AdapterSelection,
        stamp: Stamp,
        pinned_by: Caller | None,
        *,
        is_private: bool,
    ) -> None:
        """Remember what is loaded now; what was taken back by a later call meanwhile goes again."""
        if selection.merge is not None:
            return  # no name leads to it
        kind, tenant, ref = ManagedKind.LOAD, "", selection.refs[0]
        if pinned_by is not None:
            kind, tenant = ManagedKind.PIN, pinned_by.tenant
        elif is_private:
            kind, is_private = ManagedKind.RELOAD, False
        change = ManagedChange(
            kind=kind, ref=ref, stamp=stamp, tenant=tenant, is_private=is_private
        )
        self.registry.take([change])
        await self.undo_late(change)
        await self.registry.save()

    async def undo_late(self, change: ManagedChange) -> None:
        """Have what was done here go again if a call took it back that is later.

        That is one that came while this was done, or came before it and had been made after it.
        """
        record, ref = self.registry.record, change.ref
        if change.kind is ManagedKind.PIN and not record.holds(*change.key):
            self.unpin_elsewhere(ref, change.tenant)
        later = [each for each in record.about(ref) if each.stamp > change.stamp]
        is_unloaded = any(each.kind is ManagedKind.UNLOAD for each in later)
        if is_unloaded and not record.is_wanted(ref):
            await self.unload_elsewhere(ref, time.time())

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
        alias = replace(alias, stamp=self.registry.stamp())
        self._check_free(alias, in_place=in_place)
        meter, begun_at = self._meters.of(caller), time.time()
        fetched = await self.directory.fetch_target(alias, meter, refresh=True)
        await self.directory.check_text(alias, fetched)
        entry = self._catalog.place(alias.target, [fetched])
        with self._held(entry):
            await self._catalog.engine.load_adapter(entry.handle)
            self._check_free(alias, in_place=in_place)
            if self._is_last(alias):
                self.directory.aliases.put(alias)
                self._catalog.names.answered(alias.ref, None, fetched, begun_at)
                self._catalog.place(alias.selection, [fetched])
                if pin:
                    await self._bring(entry, alias.selection, caller)
        if pin and self.directory.aliases.find(alias.name) not in (None, alias):
            # By a later call it stands for something else, which is pinned as well.
            await self.pin(alias.selection, caller)
        pinned_by = caller if pin else None
        await self._keep(alias.selection, alias.stamp, pinned_by, is_private=False)
        return await self.pages.document(alias.selection)

    def _is_last(self, alias: Alias) -> bool:
        """Remember what a name stands for; whether it does, and no later call says otherwise."""
        target = alias.target
        change = ManagedChange(
            kind=ManagedKind.NAME, ref=alias.ref, stamp=alias.stamp, target=target.refs[0],
            is_private=target.token is not None,
        )  # fmt: skip
        self.registry.take([change])
        return self.registry.record.is_last(change)

    def _check_free(self, alias: Alias, *, in_place: bool) -> None:
        known = self.directory.aliases.find(alias.name)
        # Another replica may have told of this very call.
        if not in_place and known is not None and known.stamp != alias.stamp:
            raise ValidationError(
                f"the lora adapter '{alias.name}' has already been loaded; set `load_inplace` to let "
                "the name stand for another one"
            )

    async def pin(self, selection: AdapterSelection, caller: Caller = OPERATOR) -> Document:
        """Keep an adapter that is known on the shards; AdapterNotLoadedError if it is not."""
        selection, stamp = self.directory.plain(selection), self.registry.stamp()
        name, entry = await self._required(selection, caller)
        self._check_pins(name, caller)
        with self._held(entry):
            await self._bring(entry, selection, caller)
        await self._keep(selection, stamp, caller, is_private=not name.is_public)
        return await self.pages.document(selection)

    async def unpin(self, selection: AdapterSelection, caller: Caller = OPERATOR) -> Document:
        """Let an adapter be evicted again, as far as it depends on this caller's tenant.

        An admin lets it go for all. AdapterNotLoadedError if the name is not known.
        """
        selection = self.directory.plain(selection)
        ref, tenant = selection.refs[0], "" if caller.is_admin else caller.tenant
        change = ManagedChange(
            kind=ManagedKind.UNPIN, ref=ref, stamp=self.registry.stamp(), tenant=tenant
        )
        if caller.is_admin:
            # Also if it is not here: servers that are away may have it.
            await self.registry.put(change)
            name, entry = await self._required(selection, caller)
        else:
            name, entry = await self._required(selection, caller)
            await self.registry.put(change)
        holds = self.registry.record.holds
        tenants = {*name.pinned_by} if caller.is_admin else {tenant}
        # Those who pinned it by a later call keep it.
        self._unpin(
            name, entry, {each for each in tenants if not holds(ManagedKind.PIN, ref, each)}
        )
        return await self.pages.document(selection)

    def unpin_elsewhere(self, ref: AdapterRef, tenant: str) -> None:
        """Let a tenant's pin go that was taken back at another server."""
        name = self._named(ref)
        if name is not None and (entry := self._catalog.entry_of(name)) is not None:
            self._unpin(name, entry, {tenant})

    def unpin_over(self, taken: Taken) -> None:
        """Let the pins go that are over with what was done; those that the options want are none."""
        for each in taken.over:
            if each.kind is ManagedKind.PIN:
                self.unpin_elsewhere(each.ref, each.tenant)

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
        change = ManagedChange(kind=ManagedKind.RELOAD, ref=ref, stamp=self.registry.stamp())
        # Also if it is not here: servers that are away may have it.
        await self.registry.put(change)
        name = self._catalog.names.find(ref)
        if name is None or self._catalog.names.any_view(name, selection.token) is None:
            raise not_loaded(ref)
        before = name.content_key
        query = AdapterQuery(ref=ref, token=selection.token, refresh=True)
        fetched = await self.directory.fetch(query)
        if before is not None and name.content_key is None:
            # It was unloaded meanwhile: whatever came first, it is not there after both.
            self._catalog.forget(name)
            raise not_loaded(ref)
        entry = self._catalog.place(selection, [fetched])
        if self._catalog.is_pinned(entry):
            with self._held(entry):
                await self._catalog.engine.load_adapter(entry.handle)
        return {**await self.pages.document(selection), "changed": before != entry.content.key}

    async def unload(self, selection: AdapterSelection, caller: Caller = OPERATOR) -> Document:
        """Free an adapter in every tier, once the requests that use it are done.

        Requests that come after this call ask its source anew. What other adapters share
        with it stays. Goes on when the caller leaves.
        """
        selection = self.directory.plain(selection)
        ref = selection.refs[0]
        if not caller.sees(ref):
            raise not_loaded(ref)
        change = ManagedChange(kind=ManagedKind.UNLOAD, ref=ref, stamp=self.registry.stamp())
        # Also if it is not here: servers that are away may have it.
        self.unpin_over(self.registry.take([change]))
        saving = self.directory.start(self.registry.save())
        alias = self.drop_name(change)
        freed = {"device": 0, "host": 0, "disk": 0}
        shared_with: list[str] = []
        try:
            name, entry = await self._required(selection, caller)
        except AdapterNotLoadedError:
            # A name may be there whose adapter never was, or was forgotten.
            if alias is None:
                await asyncio.shield(saving)
                raise
            if (known := self._catalog.names.find(ref)) is not None:
                self._catalog.forget(known)
        else:
            # By a later call it is loaded, pinned or named.
            is_wanted = self.registry.record.is_wanted(ref)
            others = [] if is_wanted else await self._unload(name, entry, selection, alias, freed)
            shared_with = [str(other) for other in others if caller.sees(other)]
        await asyncio.shield(saving)
        return {
            "adapter_id": ref.id,
            "adapter_source": ref.source,
            "revision": ref.revision,
            "state": "unloaded",
            "freed": freed,
            "shared_with": shared_with,
        }

    def drop_name(self, unloaded: ManagedChange) -> Alias | None:
        """Take a name back that was unloaded, unless it was given later; returns what it was."""
        ref, aliases = unloaded.ref, self.directory.aliases
        alias = aliases.find(ref.id) if ref.source == ALIAS_SOURCE else None
        is_over = alias is not None and alias.stamp <= unloaded.stamp
        return aliases.drop(ref.id) if is_over else None

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

    # --- facts --------------------------------------------------------------------

    @property
    def managed_digest(self) -> int:
        """What stands for all that was managed by hand: the same for the same."""
        return self.registry.record.digest

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

    async def known(self, selection: AdapterSelection, caller: Caller = OPERATOR) -> KnownName:
        """Return a name that a caller may use and that is known; else AdapterNotLoadedError."""
        name, _ = await self._required(self.directory.plain(selection), caller)
        return name
