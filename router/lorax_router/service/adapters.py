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
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    FetchedAdapter,
    LoadReport,
    MergeSpec,
    Reason,
)
from lorax_contract.errors import LoraxError, ValidationError
from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters import AdapterRecord, AdapterState
from lorax_router.core.ports import ShardClient
from lorax_router.service.adapter_answers import AnswerBook
from lorax_router.service.adapter_listing import NameRecord, document
from lorax_router.service.adapter_text import AdapterText, read_text
from lorax_router.service.engine_port import AdapterEngine
from lorax_router.service.tokenizer_pool import TokenizerPool

logger = logging.getLogger(__name__)

# Names, answers and failures that are remembered; the oldest are forgotten.
_MAX_NAMES = 16_384
# Adapters without a slot and without a request that keep their handle.
_MAX_IDLE = 4_096
_MAX_TEXTS = 256
# How often a content that left the shards' disk is fetched again before giving up.
_REFETCHES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWish:
    """Which adapter a request wants: one, or several merged."""

    refs: tuple[AdapterRef, ...]
    merge: MergeSpec | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """What the adapter is called in headers, logs and metrics."""
        if self.merge is None:
            return self.refs[0].id
        return "merged:" + "+".join(ref.id for ref in self.refs)


@dataclass(slots=True)
class _Entry:
    """A content that has a handle."""

    handle: AdapterHandle
    content: AdapterContent
    label: str
    # The wish of the last request, to fetch what has left the disk.
    wish: AdapterWish
    disk_bytes: int
    # Names that lead here now.
    names: set[str] = field(default_factory=set)
    # Requests that hold it, from their resolution to their end.
    num_leases: int = 0
    is_retired: bool = False
    # Set while nobody holds it.
    unheld: asyncio.Event = field(default_factory=asyncio.Event)


class AdapterLease:
    """A request's hold on an adapter; ``handle`` stays good until it is released."""

    def __init__(
        self,
        entry: _Entry,
        text: AdapterText,
        wish: AdapterWish,
        phases: Mapping[str, float],
        on_release: Callable[[_Entry], None],
    ) -> None:
        self.handle = entry.handle
        self.text = text
        self.label = wish.label
        self.source = wish.refs[0].source
        self.content_key = entry.content.key
        # Seconds that resolving, downloading and verifying took; empty if it was known.
        self.phases = phases
        self._entry = entry
        self._on_release: Callable[[_Entry], None] | None = on_release

    def release(self) -> None:
        """Let the adapter go; more than once does nothing."""
        if self._on_release is not None:
            self._on_release(self._entry)
            self._on_release = None


class AdapterDirectory:
    """Owns names and handles; implements AdapterCarrier for the engine.

    Args:
        shards: fetch, prepare and release.
        tokenizers: threads in which adapters' tokenizers are read.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        shards: ShardClient,
        tokenizers: TokenizerPool,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shards = shards
        self._tokenizers = tokenizers
        self._engine: AdapterEngine | None = None
        self._handles = itertools.count(1)
        self._answers = AnswerBook(_MAX_NAMES, clock)
        self._names: OrderedDict[str, NameRecord] = OrderedDict()
        self._entries: dict[str, _Entry] = {}
        self._by_handle: dict[AdapterHandle, _Entry] = {}
        self._texts: OrderedDict[str, AdapterText] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, engine: AdapterEngine) -> None:
        """Say which engine knows the handles; before the first request."""
        self._engine = engine

    # --- requests -----------------------------------------------------------------

    async def acquire(self, wish: AdapterWish) -> AdapterLease:
        """Return a hold on the adapter that is wished for.

        Raises AdapterUnavailableError in words, ValidationError when it can never fit.
        """
        fetched = await self._fetch_all(wish)
        text = AdapterText()
        if wish.merge is None and fetched[0].text_files:
            text = await self._text(wish, fetched[0])
        # From here on nothing waits: a content found is a content held.
        entry = self._entry(wish, fetched)
        entry.num_leases += 1
        entry.unheld.clear()
        now = time.time()
        for ref in wish.refs:
            if (name := self._names.get(str(ref))) is not None:
                name.num_uses += 1
                name.last_used_at = now
        return AdapterLease(entry, text, wish, _phases(fetched), self._released)

    def _released(self, entry: _Entry) -> None:
        entry.num_leases -= 1
        if entry.num_leases == 0:
            entry.unheld.set()
            if not entry.names:
                self._retire(entry)
            self._bound_entries()

    async def _fetch_all(self, wish: AdapterWish) -> list[FetchedAdapter]:
        queries = [AdapterQuery(ref=ref, token=wish.token) for ref in wish.refs]
        if len(queries) == 1:
            return [await self._fetch(queries[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._fetch(query)) for query in queries]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _fetch(self, query: AdapterQuery) -> FetchedAdapter:
        """Return what a name leads to: remembered while the answer holds, else asked for."""
        if not query.refresh and (known := self._answers.find(query)) is not None:
            return replace(known, timings={}, downloaded=False)
        name = self._name(query.ref)
        name.num_resolving += 1
        try:
            fetched = await self._shards.fetch_adapter(query)
        except AdapterUnavailableError as error:
            name.failure = error
            raise
        finally:
            name.num_resolving -= 1
        name.failure = None
        name.fetched = fetched
        self._answers.note(query, fetched)
        return fetched

    async def _text(self, wish: AdapterWish, fetched: FetchedAdapter) -> AdapterText:
        digest = fetched.part.store_digest
        found = self._texts.get(digest)
        if found is None:
            files = await self._shards.adapter_text(digest)
            found = await self._tokenizers.run(read_text, str(wish.refs[0]), files)
            self._texts[digest] = found
            while len(self._texts) > _MAX_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(digest)
        return found

    # --- contents and handles -----------------------------------------------------

    def _entry(self, wish: AdapterWish, fetched: list[FetchedAdapter]) -> _Entry:
        """Return the entry of a content, made if it is new, and lead the name to it."""
        content = AdapterContent(parts=tuple(each.part for each in fetched), merge=wish.merge)
        entry = self._entries.get(content.key)
        if entry is None:
            entry = self._add(content, wish, fetched)
        entry.wish = wish
        if wish.merge is None:
            # The files that the name leads to now are surely there.
            entry.content = content
            name = self._name(wish.refs[0])
            # A request that was slow to get its tokenizer may bring what is outdated by now.
            if name.fetched is None or name.fetched.part == content.parts[0]:
                self._lead(name, entry)
        else:
            # A merge has no name that could lead elsewhere: it stays until it is idle for long.
            entry.names.add(content.key)
        return entry

    def _add(
        self, content: AdapterContent, wish: AdapterWish, fetched: list[FetchedAdapter]
    ) -> _Entry:
        assert self._engine is not None
        handle = AdapterHandle(next(self._handles))
        # Of a merge at most: what all its parts take together.
        self._engine.add_adapter(handle, sum(each.device_bytes for each in fetched))
        disk_bytes = sum(each.disk_bytes for each in fetched)
        entry = _Entry(handle, content, wish.label, wish, disk_bytes)
        self._entries[content.key] = entry
        self._by_handle[handle] = entry
        return entry

    def _lead(self, name: NameRecord, entry: _Entry) -> None:
        """Let a name lead to an entry; one that it leaves retires if no other name is left."""
        key = entry.content.key
        entry.names.add(str(name.ref))
        if name.content_key == key:
            return
        self._leave(name)
        name.content_key = key

    def _leave(self, name: NameRecord) -> None:
        old = self._entries.get(name.content_key or "")
        name.content_key = None
        if old is not None:
            old.names.discard(str(name.ref))
            if not old.names and not old.num_leases:
                self._retire(old)

    def _retire(self, entry: _Entry) -> None:
        """Give an entry up: its key is free for a new one at once, its memory soon."""
        if not entry.is_retired:
            task = asyncio.ensure_future(self._gone(entry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _gone(self, entry: _Entry) -> None:
        """Retire an entry and wait until the shards have freed it."""
        if not entry.is_retired:
            entry.is_retired = True
            if self._entries.get(entry.content.key) is entry:
                del self._entries[entry.content.key]
        assert self._engine is not None
        # A request that holds it may not have reached the engine yet.
        while entry.num_leases:
            await entry.unheld.wait()
        try:
            await self._engine.retire_adapter(entry.handle)
        except LoraxError as error:
            logger.warning("adapter %s did not leave: %s", entry.label, error)
        self._by_handle.pop(entry.handle, None)

    def _bound_entries(self) -> None:
        """Forget adapters that nobody used for long, so that names cannot fill the memory."""
        if len(self._entries) <= _MAX_IDLE:
            return
        assert self._engine is not None
        absent = {
            record.handle
            for record in self._engine.adapter_records()
            if record.state is AdapterState.ABSENT and record.is_idle and not record.is_pinned
        }
        idle = [e for e in self._entries.values() if not e.num_leases and e.handle in absent]
        for entry in idle[: len(self._entries) - _MAX_IDLE // 2]:
            for text in entry.names:
                self._names.pop(text, None)
            entry.names.clear()
            self._retire(entry)

    def _name(self, ref: AdapterRef) -> NameRecord:
        key = str(ref)
        record = self._names.get(key)
        if record is None:
            record = self._names[key] = NameRecord(ref)
            if len(self._names) > _MAX_NAMES:
                self._drop_old_names()
        self._names.move_to_end(key)
        return record

    def _drop_old_names(self) -> None:
        for key, record in list(self._names.items())[: _MAX_NAMES // 8]:
            if not (record.num_resolving or record.content_key or record.is_pinned):
                del self._names[key]

    # --- the engine's carrier -----------------------------------------------------

    async def prepare(self, handle: AdapterHandle) -> LoadReport:
        """Make an adapter ready on all ranks; what left the disk is fetched again."""
        entry = self._by_handle[handle]
        for left in reversed(range(_REFETCHES + 1)):
            try:
                return await self._shards.prepare_adapter(handle, entry.content)
            except AdapterUnavailableError as error:
                if error.reason is not Reason.EVICTED or not left:
                    raise
            await self._fetch_again(entry)
        raise AssertionError("unreachable")

    async def _fetch_again(self, entry: _Entry) -> None:
        wish = entry.wish
        queries = [AdapterQuery(ref=ref, token=wish.token, refresh=True) for ref in wish.refs]
        fetched = [await self._fetch(query) for query in queries]
        content = AdapterContent(parts=tuple(each.part for each in fetched), merge=wish.merge)
        if content.key != entry.content.key:
            raise AdapterUnavailableError(
                Reason.EVICTED,
                f"adapter {wish.label} left the disk and was replaced at its source meanwhile; "
                "send the request again to use the new one",
            )
        entry.content = content

    async def release(self, handle: AdapterHandle) -> None:
        """Free an adapter on all ranks; its host copy and its files stay."""
        await self._shards.release_adapter(handle)

    # --- management ---------------------------------------------------------------

    async def load(self, wish: AdapterWish, *, pin: bool = False) -> None:
        """Have an adapter on the shards before a request asks for it, and keep it if pinned."""
        assert self._engine is not None
        lease = await self.acquire(wish)
        try:
            await self._engine.load_adapter(lease.handle, pin=pin)
            if pin:
                self._name(wish.refs[0]).is_pinned = True
        finally:
            lease.release()

    def unpin(self, ref: AdapterRef) -> None:
        """Let an adapter be evicted again; AdapterUnavailableError if the name is not known."""
        name, entry = self._require(ref)
        name.is_pinned = False
        others = (self._names[text] for text in entry.names if text in self._names)
        if not any(other.is_pinned for other in others):
            assert self._engine is not None
            self._engine.unpin_adapter(entry.handle)

    async def reload(self, wish: AdapterWish) -> FetchedAdapter:
        """Ask the source of a name anew; requests under way finish with what they have."""
        ref = wish.refs[0]
        self._answers.forget(ref)
        fetched = await self._fetch(AdapterQuery(ref=ref, token=wish.token, refresh=True))
        name = self._name(ref)
        old = self._entries.get(name.content_key or "")
        entry = self._entry(wish, [fetched])
        if old is not None and entry is not old and name.is_pinned:
            assert self._engine is not None
            await self._engine.load_adapter(entry.handle, pin=True)
        return fetched

    async def unload(self, ref: AdapterRef) -> None:
        """Free an adapter in every tier, once the requests that use it are done.

        Requests that come after this call fetch it anew.
        """
        name, entry = self._require(ref)
        self._answers.forget(ref)
        del self._names[str(ref)]
        name.is_pinned = False
        entry.names.discard(str(ref))
        if entry.names:
            return  # another name leads to the same content
        await self._gone(entry)
        await self._shards.release_adapter(entry.handle, self._unshared(entry))
        for part in entry.content.parts:
            self._texts.pop(part.store_digest, None)

    def _unshared(self, entry: _Entry) -> list[AdapterPart]:
        """The parts of an entry that no other adapter is made of."""
        used = {
            part.content_digest
            for other in self._entries.values()
            if other is not entry
            for part in other.content.parts
        }
        return [part for part in entry.content.parts if part.content_digest not in used]

    def _require(self, ref: AdapterRef) -> tuple[NameRecord, _Entry]:
        name = self._names.get(str(ref))
        entry = self._entries.get(name.content_key or "") if name is not None else None
        if name is None or entry is None:
            raise ValidationError(
                f"adapter {ref} is not loaded; GET /v1/adapters lists those that are"
            )
        return name, entry

    # --- facts --------------------------------------------------------------------

    def records(self) -> list[tuple[NameRecord, AdapterRecord | None]]:
        """Return every known name with the engine's record of what it leads to."""
        assert self._engine is not None
        by_handle = {record.handle: record for record in self._engine.adapter_records()}
        found: list[tuple[NameRecord, AdapterRecord | None]] = []
        for name in self._names.values():
            entry = self._entries.get(name.content_key or "")
            found.append((name, by_handle.get(entry.handle) if entry is not None else None))
        return found

    def labels(self) -> dict[AdapterHandle, str]:
        """Return what each handle is called."""
        return {handle: entry.label for handle, entry in self._by_handle.items()}

    async def listing(self) -> list[dict[str, Any]]:
        """Return all known adapters with their state and bytes per tier, as JSON has them."""
        tiers = await self._shards.adapter_tiers()
        listed = []
        for name, record in self.records():
            entry = self._entries.get(name.content_key or "")
            listed.append(document(name, record, entry.content if entry else None, tiers))
        return listed


def _phases(fetched: list[FetchedAdapter]) -> dict[str, float]:
    """Seconds by phase of the slowest of several; empty when nothing was asked for."""
    phases: dict[str, float] = {}
    for each in fetched:
        for phase, seconds in each.timings.items():
            # The queue of the fetcher is part of finding out what a name leads to.
            phase = "resolve" if phase in ("queue", "wait") else phase
            phases[phase] = phases.get(phase, 0.0) + seconds
    return phases
