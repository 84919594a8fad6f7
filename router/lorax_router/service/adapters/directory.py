"""The directory of adapters: from the names that requests give to handles that can run.

    name ──fetch──► content ──► handle
     (asked for again after a while)    (never names another content)

Names that lead to equal contents share a handle, so they share memory. When a name comes
to lead elsewhere, requests under way finish with the old handle, which then retires; new
ones get the new. Nothing here blocks: what is slow happens in the shards' fetcher, and
each request waits for its own adapter only.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any

from cachetools import LRUCache

from lorax_contract.adapters import (
    ALIAS_SOURCE,
    AdapterContent,
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    FetchedAdapter,
    LoadReport,
    Reason,
)
from lorax_contract.errors import LoraxError
from lorax_contract.step import AdapterHandle
from lorax_router.core.ports import ShardClient
from lorax_router.service.adapters.aliases import Alias, AliasBook
from lorax_router.service.adapters.catalog import AdapterCatalog, AdapterSelection, CatalogEntry
from lorax_router.service.adapters.selection import place_key
from lorax_router.service.adapters.text import AdapterText, AdapterTexts
from lorax_router.service.beside import all_of
from lorax_router.service.engine.port import AdapterEngine
from lorax_router.service.keys.meters import UNMETERED, TenantMeter

__all__ = ["AdapterDirectory", "AdapterLease", "AdapterSelection"]

logger = logging.getLogger(__name__)

# Names, answers and failures that are remembered; the oldest are forgotten.
_MAX_NAMES = 16_384
# Adapters without a slot and without a request that keep their handle.
_MAX_IDLE = 4_096
# Rows without finite logits, one after the other, after which an adapter is quarantined.
_MAX_FAULTS = 3
# Seconds after which it is let in again.
_QUARANTINE_S = 600.0
# How often a content that left the shards' disk is fetched again before giving up.
_REFETCHES = 2


class AdapterLease:
    """A request's hold on an adapter; ``handle`` stays good until it is released."""

    def __init__(
        self,
        entry: CatalogEntry,
        text: AdapterText,
        *,
        label: str,
        is_private: bool,
        phases: Mapping[str, float],
        on_release: Callable[[CatalogEntry], None],
    ) -> None:
        self.handle = entry.handle
        self.text = text
        self.content = entry.content
        self.invocation_ids = entry.invocation_ids
        self.head = entry.head
        # What the adapter is called, however the request spelled it.
        self.label = label
        # Whether it took the caller's token, so that others may not learn of it.
        self.is_private = is_private
        # Seconds that resolving, downloading and verifying took; empty if it was known.
        self.phases = phases
        self._entry = entry
        self._on_release: Callable[[CatalogEntry], None] | None = on_release

    def release(self) -> None:
        """Let the adapter go; more than once does nothing."""
        if self._on_release is not None:
            self._on_release(self._entry)
            self._on_release = None


class AdapterDirectory:
    """Finds adapters for requests, and carries out the engine's orders (OrderExecutor).

    Args:
        shards: fetch, prepare and release.
        texts: finds adapters' own tokenizers and templates.
        aliases: names that stand for others.
        clock: monotonic seconds.
        max_names, max_idle: see AdapterCatalog.
    """

    def __init__(
        self,
        shards: ShardClient,
        texts: AdapterTexts | None = None,
        *,
        aliases: AliasBook | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_names: int = _MAX_NAMES,
        max_idle: int = _MAX_IDLE,
    ) -> None:
        self._shards = shards
        self.aliases = aliases or AliasBook()
        self.catalog = AdapterCatalog(
            self._retire, clock=clock, max_names=max_names, max_idle=max_idle
        )
        self._clock = clock
        # What a source's answer calls a name that was spelled otherwise, and until when the
        # answer holds.
        self._spellings: LRUCache[AdapterRef, tuple[AdapterRef, float]] = LRUCache(max_names)
        self._texts = texts or AdapterTexts(shards.adapter_text)
        self._tasks: set[asyncio.Task[None]] = set()
        # Those that came to the shards and were not released since.
        self._prepared: set[AdapterHandle] = set()

    def attach(self, engine: AdapterEngine) -> None:
        """Say which engine knows the handles; before the first request."""
        self.catalog.attach(engine)

    # --- requests -----------------------------------------------------------------

    async def acquire(
        self,
        selection: AdapterSelection,
        *,
        refresh: bool = False,
        meter: TenantMeter = UNMETERED,
    ) -> AdapterLease:
        """Return a hold on the adapter that is selected; with ``refresh`` its source is asked.

        What its source is asked counts for ``meter``. Raises AdapterUnavailableError in words,
        ValidationError when it can never fit, QuotaError.
        """
        fetched = await self._fetch_all(selection, meter, refresh=refresh)
        selection = self.plain(selection)
        text = AdapterText()
        if selection.merge is None:
            fetched[0], text = await self._text(selection, fetched[0], meter)
        return self._held(selection, fetched, text, _phases(fetched), refresh=refresh)

    def known(self, selection: AdapterSelection) -> list[FetchedAdapter] | None:
        """Return the answers for the names of an adapter if nobody has to be asked, else None."""
        known = []
        for ref in selection.refs:
            if (answer := self._known(ref, selection.token)) is None:
                return None
            known.append(answer)
        return known

    def acquire_known(
        self, selection: AdapterSelection, known: list[FetchedAdapter] | None
    ) -> AdapterLease | None:
        """Return a hold on what ``known`` found if nothing is waited for; None: ``acquire`` does.

        Raises as that does.
        """
        if selection.merge is not None or known is None or known[0].text_files:
            return None
        return self._held(self.plain(selection), known, AdapterText(), {})

    def _held(
        self,
        selection: AdapterSelection,
        fetched: list[FetchedAdapter],
        text: AdapterText,
        phases: Mapping[str, float],
        *,
        refresh: bool = False,
    ) -> AdapterLease:
        """Hold what was found. Nothing waits here: a content found is a content held."""
        entry = self.catalog.place(selection, fetched)
        if refresh or self._clock() > entry.quarantined_until:
            # Whoever loads it by hand gives it another try, and so does time.
            entry.quarantine = None
        if (why := entry.quarantine) is not None:
            raise AdapterUnavailableError(why.reason, why.text)
        self.catalog.hold(entry)
        self.catalog.used(selection, entry)
        return AdapterLease(
            entry,
            text,
            label=selection.label,
            is_private=entry.is_private,
            phases=phases,
            on_release=self.catalog.let_go,
        )

    def is_resident(self, selection: AdapterSelection, known: list[FetchedAdapter] | None) -> bool:
        """Whether a request finds on the shards what ``known`` found, without asking anybody."""
        if known is None:
            return False
        parts = tuple(each.part for each in known)
        return self.catalog.is_resident(AdapterContent(parts=parts, merge=selection.merge))

    def plain(self, selection: AdapterSelection) -> AdapterSelection:
        """Return a selection by the one spelling of each name that was last heard of."""
        refs = tuple(self._plain(ref, at_least=-math.inf) for ref in selection.refs)
        return selection if refs == selection.refs else replace(selection, refs=refs)

    def other_spellings(self, refs: Collection[AdapterRef]) -> list[AdapterRef]:
        """Return what some adapters were called otherwise that only their source could read."""
        return [other for other, (said, _) in self._spellings.items() if said in refs]

    def keys_of(self, entries: Iterable[CatalogEntry]) -> list[str]:
        """Return what ``place_key`` may call some entries, each once."""
        stands_for = self.aliases.stands_for
        selections: list[AdapterSelection] = []
        refs: dict[AdapterRef, None] = {}
        for entry in entries:
            if entry.is_merge:
                selections.append(entry.selection)
            else:
                refs |= dict.fromkeys(name.ref for name in entry.names.values())
        # Who sends requests here knows no roots: to it a path below one is another name.
        refs |= dict.fromkeys(self.other_spellings(refs))
        selections += [AdapterSelection(refs=(ref,)) for ref in refs]
        return [*dict.fromkeys(place_key(each, stands_for) for each in selections)]

    def _plain(self, ref: AdapterRef, at_least: float | None = None) -> AdapterRef:
        """Return the one spelling of a name, if what is known of it holds until then, or now."""
        ref = ref.plain
        said, until = self._spellings.get(ref, (ref, math.inf))
        return said if until > (self._clock() if at_least is None else at_least) else ref

    def _known(self, ref: AdapterRef, token: str | None) -> FetchedAdapter | None:
        """Return the answer for a name that a caller may have without asking."""
        names = self.catalog.names
        if ref.source == ALIAS_SOURCE:
            return names.answer(ref, None)
        return names.answer(self._plain(ref), token)

    async def _fetch_all(
        self, selection: AdapterSelection, meter: TenantMeter, *, refresh: bool
    ) -> list[FetchedAdapter]:
        queries = _queries(selection, refresh=refresh)
        return await all_of([self.fetch(query, meter) for query in queries])

    async def fetch(self, query: AdapterQuery, meter: TenantMeter = UNMETERED) -> FetchedAdapter:
        """Return what a name leads to: remembered while the answer holds, else asked for.

        Asking counts for ``meter``, once for all who ask the same at the same time.
        """
        if not query.refresh and (known := self._known(query.ref, query.token)) is not None:
            return replace(known, timings={}, downloaded=False)
        if query.ref.source == ALIAS_SOURCE:
            return await self._fetch_alias(query, meter)
        names, ref = self.catalog.names, self._plain(query.ref)
        view, asked_at = names.began(ref, query.token), time.time()
        try:
            async with meter.fetching(ref, self._shards.adapter_tiers):
                # In the caller's spelling: what it means may have changed.
                fetched = await self._shards.fetch_adapter(replace(query, ref=query.ref.plain))
            meter.fetched(ref, fetched)
            spelled = self._spelled(query.ref.plain, fetched)
            names.answered(spelled, query.token, fetched, asked_at)
        except AdapterUnavailableError as error:
            names.failed(view, error)
            raise
        finally:
            names.ended(view)
        return fetched

    async def _fetch_alias(self, query: AdapterQuery, meter: TenantMeter) -> FetchedAdapter:
        """Return what an alias leads to, whoever asks."""
        names, ref = self.catalog.names, query.ref
        if (alias := self.aliases.find(ref.id)) is None:
            raise AdapterUnavailableError(Reason.NOT_FOUND, f"there is no adapter named {ref.id!r}")
        view = names.began(ref, None)
        try:
            while True:
                asked_at = time.time()
                fetched = await self.fetch_target(alias, meter, refresh=query.refresh)
                now = self.aliases.find(ref.id)
                if now is alias:
                    names.answered(ref, None, fetched, asked_at)
                # Who asked before the name was taken back gets what it stood for.
                if now is alias or now is None:
                    return fetched
                alias = now
        except AdapterUnavailableError as error:
            names.failed(view, error)
            raise
        finally:
            names.ended(view)

    async def fetch_target(
        self, alias: Alias, meter: TenantMeter = UNMETERED, *, refresh: bool
    ) -> FetchedAdapter:
        """Return what an alias stands for, by the token that the operator gave with it."""
        (ref,), token = alias.target.refs, alias.target.token
        query = AdapterQuery(ref=ref.plain, token=token, refresh=refresh)
        async with meter.fetching(alias.ref, self._shards.adapter_tiers):
            fetched = await self._shards.fetch_adapter(query)
        meter.fetched(alias.ref, fetched)
        # Whoever may ask this server may use it.
        return replace(fetched, access="server") if fetched.access == "token" else fetched

    def _spelled(self, ref: AdapterRef, fetched: FetchedAdapter) -> AdapterRef:
        """Return the name that an answer is about, and remember what was meant by this one."""
        if fetched.id in (None, ref.id):
            self._spellings.pop(ref, None)
            return ref
        said = replace(ref, id=fetched.id)
        self._spellings[ref] = (said, self._clock() + fetched.valid_s)
        return said

    async def check_text(self, alias: Alias, fetched: FetchedAdapter) -> None:
        """Raise AdapterUnavailableError if what an adapter brings for texts is not served."""
        await self._texts.find(alias.name, fetched)

    async def _text(
        self, selection: AdapterSelection, fetched: FetchedAdapter, meter: TenantMeter
    ) -> tuple[FetchedAdapter, AdapterText]:
        """Return what an adapter brings for texts; what left the disk is fetched again."""
        name = str(selection.refs[0])
        try:
            return fetched, await self._texts.find(name, fetched)
        except AdapterUnavailableError as error:
            if error.reason is not Reason.EVICTED:
                raise
        (query,) = _queries(selection, refresh=True)
        fetched = await self.fetch(query, meter)
        return fetched, await self._texts.find(name, fetched)

    # --- the engine's carrier -----------------------------------------------------

    async def prepare(self, handle: AdapterHandle) -> LoadReport:
        """Make an adapter ready on all ranks; what left the disk is fetched again."""
        entry = self.catalog.by_handle[handle]
        for left in reversed(range(_REFETCHES + 1)):
            try:
                report = await self._shards.prepare_adapter(handle, entry.content)
                self._prepared.add(handle)
                return report
            except AdapterUnavailableError as error:
                if error.reason is not Reason.EVICTED or not left:
                    raise
            await self._fetch_again(entry)
        raise AssertionError("unreachable")

    async def _fetch_again(self, entry: CatalogEntry) -> None:
        selection = entry.selection
        fetched = [await self.fetch(query) for query in _queries(selection, refresh=True)]
        content = AdapterContent(parts=tuple(each.part for each in fetched), merge=selection.merge)
        if content.key != entry.content.key:
            raise AdapterUnavailableError(
                Reason.EVICTED,
                f"adapter {selection.label} left the disk and was replaced at its source meanwhile; "
                "send the request again to use the new one",
            )
        entry.content = content

    async def release(self, handle: AdapterHandle) -> None:
        """Free an adapter on all ranks; its host copy and its files stay."""
        await self._shards.release_adapter(handle)
        if handle in self._prepared:
            self._prepared.discard(handle)
            entry = self.catalog.by_handle.get(handle)
            record = self.catalog.engine.adapter_record(handle)
            self.catalog.events.evicted(
                f"{handle}" if entry is None else entry.label,
                is_retired=record is None or record.is_retired,
            )

    def no_numbers(self, handle: AdapterHandle) -> None:
        """A row had no finite logits: after some one after the other its adapter is let in no more."""
        if (entry := self.catalog.by_handle.get(handle)) is None:
            return
        entry.num_faults += 1
        if entry.num_faults >= _MAX_FAULTS and entry.quarantine is None:
            num, entry.num_faults = entry.num_faults, 0
            entry.quarantined_until = self._clock() + _QUARANTINE_S
            entry.quarantine = AdapterUnavailableError(
                Reason.QUARANTINED,
                f"the last {num} requests with this adapter had logits that are no finite "
                "numbers; check its weights, then load it again",
            )
            self.catalog.events.quarantined(entry.label, entry.quarantine.text, _QUARANTINE_S)

    def shards_lost(self) -> None:
        """What computed without numbers may have been the shards that are gone."""
        self._prepared.clear()
        for entry in self.catalog.by_handle.values():
            entry.num_faults, entry.quarantine = 0, None

    def numbers(self, handle: AdapterHandle) -> None:
        """A row ended well."""
        if (entry := self.catalog.by_handle.get(handle)) is not None:
            entry.num_faults = 0

    # --- leaving ------------------------------------------------------------------

    def _retire(self, entry: CatalogEntry) -> None:
        self.start(self.gone(entry))

    async def gone(self, entry: CatalogEntry) -> None:
        """Return when nobody holds a detached entry any more and the shards have freed it."""
        # A request that holds it may not have reached the engine yet.
        while entry.num_leases:
            await entry.unheld.wait()
        if entry.handle not in self.catalog.by_handle:
            return
        try:
            await self.catalog.engine.retire_adapter(entry.handle)
        except LoraxError as error:
            logger.warning("adapter %s did not leave: %s", entry.label, error)
        self.catalog.gone(entry)

    async def forget_files(self, entry: CatalogEntry) -> None:
        """Free the host copies and the files of a gone entry, but for what others need."""
        await self._shards.release_adapter(entry.handle, self.catalog.unshared(entry))
        for part in entry.content.parts:
            self._texts.forget(part.store_digest)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work that outlives its caller."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _queries(selection: AdapterSelection, *, refresh: bool) -> list[AdapterQuery]:
    return [AdapterQuery(ref=ref, token=selection.token, refresh=refresh) for ref in selection.refs]


def _phases(fetched: list[FetchedAdapter]) -> dict[str, float]:
    """Seconds by phase of the slowest of several; empty when nothing was asked for."""
    phases: dict[str, float] = {}
    for each in fetched:
        for phase, seconds in each.timings.items():
            # The queue of the fetcher is part of finding out what a name leads to.
            phase = "resolve" if phase in ("queue", "wait") else phase
            phases[phase] = phases.get(phase, 0.0) + seconds
    return phases
