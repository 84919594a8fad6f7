"""All that one rank does for adapters beside its steps: fetch (rank 0), prepare, release.

Used from the event loop of the shard's server. Slow work runs in the fetcher's processes
or in a few threads, never in the loop and never in the thread that computes steps.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lorax_contract.adapters import (
    LOCAL_SOURCE,
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterTiers,
    AdapterUnavailableError,
    FetchedAdapter,
    LoadReport,
    Reason,
)
from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_contract.step import AdapterHandle
from lorax_shard.adapter_files import TOKENIZER_FILE
from lorax_shard.adapters.copies.copier import EntryCopier
from lorax_shard.adapters.copies.pieces import StoredPieces
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.adapters.host_memory import give_back
from lorax_shard.adapters.prepare_lane import PrepareLane
from lorax_shard.fetching.client import AdapterFetcher, Fetched
from lorax_shard.store.kept import kept
from lorax_shard.store.store import AdapterStore, Lease
from lorax_shard.threads import release_team
from lorax_shard.vocabulary import Vocabulary

_Made = TypeVar("_Made")
logger = logging.getLogger(__name__)

# Reading and copying at the same time; more would only take the steps' cores.
_NUM_THREADS = 2
# How much they give way to steps, as a fetch does.
_NICE = 7
# What was fetched is held until it is loaded, so that its files are still there then; but not
# for longer, nor more than so many: what is held, the store cannot evict for others.
_HELD_S = 60.0
_NUM_HELD = 64


@dataclass(frozen=True, slots=True)
class _Held:
    lease: Lease
    since: float


class RankAdapters:
    """Implements the adapter calls of one rank.

    Args:
        lane: prepared adapters.
        host: copies of what lies in the store.
        store: the files.
        fetcher: rank 0's, and one of each rank with a store of its own; None on the others.
        copier: brings what rank 0 has to a rank with a store of its own; None on the others.
    """

    def __init__(
        self,
        lane: PrepareLane,
        host: HostCache,
        store: AdapterStore,
        fetcher: AdapterFetcher | None,
        copier: EntryCopier | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lane = lane
        self._host = host
        self._store = store
        self._fetcher = fetcher
        self._copier = copier
        # What other ranks may read of this host's store.
        self.stored = StoredPieces(store)
        self._threads = ThreadPoolExecutor(
            _NUM_THREADS, thread_name_prefix="adapters", initializer=give_way
        )
        self._copies = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="copies")
        self._now = now
        # By store digest, the one fetched last at the end.
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def start(self) -> None:
        """Get ready for the first fetch, in the background."""
        if self._fetcher is not None:
            self._fetcher.start()

    async def fetch(self, query: AdapterQuery) -> FetchedAdapter:
        """Have an adapter on this host's disk, verified; raises AdapterUnavailableError."""
        if query.wanted is not None and self._copier is not None:
            return await self._same(query, query.wanted, self._copier)
        return await self._fetched(query)

    async def _fetched(self, query: AdapterQuery) -> FetchedAdapter:
        if self._fetcher is None:
            raise AdapterUnavailableError(Reason.OFFLINE, "rank 0 fetches adapters for this one")
        fetched = await self._fetcher.fetch(query.ref, query.token, refresh=query.refresh)
        self._hold(fetched.digest, fetched.lease)
        return described(fetched)

    async def _same(
        self, query: AdapterQuery, wanted: FetchedAdapter, copier: EntryCopier
    ) -> FetchedAdapter:
        """Have what rank 0 has: from the source if all can reach it, or from rank 0."""
        loop, part = asyncio.get_running_loop(), wanted.part
        here = await kept(loop.run_in_executor(self._copies, copier.held, part))
        if here is not None:
            self._hold(part.store_digest, here)
            return replace(wanted, downloaded=False, timings={})
        # The same path is another folder on another machine.
        if query.ref.source != LOCAL_SOURCE:
            try:
                fetched = await self._fetched(query)
                if fetched.part == part:
                    return fetched
            except AdapterUnavailableError as error:
                logger.info("adapter %s is read from rank 0: %s", query.ref, error.text)
        began = self._now()
        try:
            lease = await kept(loop.run_in_executor(self._copies, copier.copy, wanted))
        except AdapterUnavailableError as error:
            text = f"adapter {query.ref}: {error.text}"
            raise AdapterUnavailableError(error.reason, text) from error
        self._hold(part.store_digest, lease)
        return replace(wanted, downloaded=True, timings={"download": self._now() - began})

    def _hold(self, store_digest: str, lease: Lease) -> None:
        self._let_go(store_digest)
        now = self._now()
        self._held[store_digest] = _Held(lease, now)
        while len(self._held) > _NUM_HELD or self._oldest().since < now - _HELD_S:
            self._held.popitem(last=False)[1].lease.release()

    def _oldest(self) -> _Held:
        return next(iter(self._held.values()))

    def _let_go(self, *store_digests: str) -> None:
        for digest in store_digests:
            if (held := self._held.pop(digest, None)) is not None:
                held.lease.release()

    async def text(self, store_digest: str, names: Iterable[str]) -> dict[str, bytes]:
        """Return those of the named tokenizer and template files that a stored adapter has."""
        return await asyncio.to_thread(self._text, store_digest, frozenset(names))

    def _text(self, store_digest: str, names: frozenset[str]) -> dict[str, bytes]:
        lease = self._store.lease(store_digest)
        if lease is None:
            raise AdapterUnavailableError(
                Reason.EVICTED, "the adapter's files left the disk; it must be fetched again"
            )
        with lease as entry:
            files = [name for name in entry.tokenizer_files if name in names]
            return {name: Path(entry.folder, name).read_bytes() for name in files}

    async def prepare(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        """Make a content ready under its handle."""
        prepare = functools.partial(_alone, self.lane.prepare, handle, content)
        try:
            report = await asyncio.get_running_loop().run_in_executor(self._threads, prepare)
        except AdapterUnavailableError as error:
            if error.reason is Reason.CORRUPT:
                # What is damaged goes, so that the next fetch brings it anew.
                await self.release(handle, content.parts)
            raise
        self._let_go(*(part.store_digest for part in content.parts))
        return report

    async def tokens(self, content: AdapterContent) -> tuple[Vocabulary | None, int]:
        """Return the tokens that a content brings, and the rows of its head; None: the base's.

        Raises AdapterUnavailableError.
        """
        read = functools.partial(self.lane.tokens, content)
        return await asyncio.get_running_loop().run_in_executor(self._threads, read)

    async def release(self, handle: AdapterHandle, forget: Sequence[AdapterPart] = ()) -> bool:
        """Let a prepared adapter go, and of the parts to forget everything.

        Returns whether it was here. Files that cannot go do not keep memory from being free.
        """
        self._let_go(*(part.store_digest for part in forget))
        return await asyncio.to_thread(self._release, handle, tuple(forget))

    def _release(self, handle: AdapterHandle, forget: Sequence[AdapterPart]) -> bool:
        was_here = self.lane.release(handle)
        self._host.drop(part.content_digest for part in forget)
        for part in forget:
            self._remove_files(part.store_digest)
        if forget:
            give_back()
        return was_here

    def _remove_files(self, store_digest: str) -> None:
        try:
            if not self._store.remove(store_digest):
                logger.info("adapter files %s stay: another process reads them", store_digest)
        except Exception as error:  # noqa: BLE001 - a read-only folder, a disk that fails
            logger.warning("adapter files %s cannot be removed: %s", store_digest, error)

    async def tiers(self, parts: Sequence[AdapterPart]) -> AdapterTiers:
        """Return what is prepared, and where these parts lie."""
        return await asyncio.to_thread(self._tiers, parts)

    def _tiers(self, parts: Sequence[AdapterPart]) -> AdapterTiers:
        host = self._host.sizes()
        asked = {part.content_digest for part in parts} & host.keys()
        return AdapterTiers(
            device=self.lane.device_tier(),
            host={digest: host[digest] for digest in asked},
            disk=self._store.index.sizes({part.store_digest for part in parts}),
        )

    async def close(self) -> None:
        """End the fetcher's processes and the threads."""
        if self._fetcher is not None:
            await self._fetcher.close()
        self._let_go(*list(self._held))
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._copies.shutdown(wait=False, cancel_futures=True)


def _alone(call: Callable[..., _Made], *args: Any) -> _Made:
    """Return what a call makes; threads that computed with it are not kept from steps."""
    try:
        return call(*args)
    finally:
        release_team()


def give_way() -> None:
    """Let the calling thread compute only where steps leave a core alone.

    On Linux each thread has a priority of its own; elsewhere this would be the process'.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        own = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, own + _NICE)


def _head(facts: Mapping[str, Any] | None) -> HeadFacts | None:
    if facts is None:
        return None
    pooling, scores = Pooling(facts["pooling"]), ScoreKind(facts["scores"])
    return HeadFacts(pooling=pooling, labels=tuple(facts["labels"]), scores=scores)


def described(fetched: Fetched) -> FetchedAdapter:
    """Return what crosses to the router."""
    facts = fetched.facts
    # With the base's tokenizer its texts need no process of their own.
    left_out = (TOKENIZER_FILE,) if facts.get("is_bases_tokenizer") else ()
    return FetchedAdapter(
        version=fetched.version,
        part=AdapterPart(str(facts["content_digest"]), fetched.digest),
        disk_bytes=fetched.bytes,
        device_bytes=int(facts["device_bytes"]),
        max_rank=int(facts["max_rank"]),
        vocab_size=int(facts["vocab_size"]),
        access=fetched.access,
        valid_s=fetched.valid_s,
        downloaded=fetched.downloaded,
        stale=fetched.stale,
        timings=fetched.timings,
        text_files=tuple(name for name in fetched.tokenizer_files if name not in left_out),
        warnings=tuple(facts.get("warnings", ())),
        id=fetched.ref.id,
        invocation_ids=tuple(facts.get("invocation_ids", ())),
        head=_head(facts.get("head")),
    )
