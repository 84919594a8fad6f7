"""Adapters by name, for the process that holds the model: ask, wait, get a folder.

    fetcher = AdapterFetcher(settings)
    fetched = await fetcher.fetch(AdapterRef.of("hub", "org/name"), token)
    with fetched:                       # the lease: the folder stays meanwhile
        parse(fetched.folder)
    await fetcher.close()

Everything slow or dangerous happens in the child process (process.py). Here is what makes
many requests for one adapter wait for one fetch, and the memory of what failed. What a name
led to is remembered by who asked, for as long as the answer says (``valid_s``); a version
that lies in the store is not fetched again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from cachetools import LRUCache

from lorax_contract.adapters import Access, AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.adapter_files import TEMPLATE_FILES
from lorax_shard.fetching.child import RestartedChild
from lorax_shard.fetching.flights import FlightEnded, Flights
from lorax_shard.fetching.job import FetchOutcome
from lorax_shard.fetching.negative import NegativeCache, NegativeSettings
from lorax_shard.fetching.process import Setup
from lorax_shard.fetching.redact import without_secrets
from lorax_shard.fetching.tokens import TokenHash, checked
from lorax_shard.store.evictions import log_eviction
from lorax_shard.store.kept import kept
from lorax_shard.store.store import AdapterStore, Lease

logger = logging.getLogger(__name__)

# Adapters whose warnings are remembered as told.
_MAX_TOLD = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSettings:
    """What the fetcher is told."""

    setup: Setup
    # Fetches at the same time, those apart that have waited for their source for long: at
    # most so many times more of them.
    concurrency: int = 8
    place_s: float = 3.0
    slow_factor: int = 8
    # For how long an answer holds for its caller, a source's "yes" to a token included.
    valid_s: float = 300.0
    negative: NegativeSettings = field(default_factory=NegativeSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """An adapter on this host's disk. It stays there until it is released."""

    # By its one spelling, where its source takes several.
    ref: AdapterRef
    # The concrete version: a commit, a digest of entity tags or of file times.
    version: str
    # Names the content: configuration, weights and tokenizer files.
    digest: str
    folder: Path
    bytes: int
    files: tuple[str, ...]
    # Files of an own tokenizer, chat template included.
    tokenizer_files: tuple[str, ...]
    # What the verifier found out.
    facts: Mapping[str, Any]
    access: Access
    # Seconds by phase: queue, resolve, wait (for another process), download, verify.
    timings: Mapping[str, float]
    # Whether bytes came for this answer.
    downloaded: bool
    # Whether the source was out of reach, and this is what it named last.
    stale: bool
    # For how many seconds this answer holds for its caller.
    valid_s: float
    lease: Lease

    @property
    def chat_template(self) -> Path | None:
        """The adapter's own template file, if it has one."""
        names = [name for name in TEMPLATE_FILES if name in self.tokenizer_files]
        return self.folder / names[0] if names else None

    def release(self) -> None:
        """Let the store evict the folder when its turn comes; more than once does nothing."""
        self.lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AdapterFetcher:
    """The store's client in one process. Used from one event loop."""

    def __init__(
        self, settings: FetchSettings, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.store: AdapterStore = settings.setup.open_store()
        self._settings = settings
        self._now = now
        self._hash = TokenHash()
        self._negative = NegativeCache(settings.negative, now=now)
        self._flights: Flights[FetchOutcome] = Flights()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._processes = asyncio.Semaphore(settings.concurrency * settings.slow_factor)
        self._child = RestartedChild(settings.setup)
        # Whose warnings are in the log.
        self._told: LRUCache[tuple[str, str], None] = LRUCache(_MAX_TOLD)
        self._closed = False

    def start(self) -> None:
        """Start the child process in the background, so that the first fetch finds it running."""
        self._child.start()

    async def fetch(
        self, ref: AdapterRef, token: str | None = None, *, refresh: bool = False
    ) -> Fetched:
        """Return the adapter that ``ref`` names now, for a caller with ``token``.

        ``refresh`` tries again what failed a moment ago, and waits for no fetch that began
        before. Raises AdapterUnavailableError. Cancelling ends the fetch unless others wait
        for it too.
        """
        token = checked(token)
        if not refresh:
            self._raise_known_failure(ref, token)
        # Twice: another process may evict the entry between the answer and the lease.
        for _ in range(2):
            outcome = await self._joined(ref, token, refresh)
            taking = asyncio.to_thread(self.store.lease, outcome.digest)
            lease = await kept(asyncio.ensure_future(taking))
            if lease is not None:
                return self._fetched(ref, outcome, lease)
        raise AdapterUnavailableError(
            Reason.STORE_FULL, f"adapter {ref} was evicted as soon as it was fetched"
        )

    async def close(self) -> None:
        """End the child process; fetches under way fail."""
        self._closed = True
        await self._flights.end()
        await self._child.close()

    async def _joined(self, ref: AdapterRef, token: str | None, refresh: bool) -> FetchOutcome:
        """Wait for the one fetch of this name with this token."""
        if self._closed:
            raise AdapterUnavailableError(Reason.TRANSIENT, "the server is shutting down")
        key = (ref.key, self._hash(token), refresh)
        try:
            return await self._flights.join(key, lambda: self._asked(ref, token))
        except FlightEnded:
            raise AdapterUnavailableError(
                Reason.TRANSIENT, f"the fetch of adapter {ref} was ended"
            ) from None

    async def _asked(self, ref: AdapterRef, token: str | None) -> FetchOutcome:
        queued_at = self._now()
        async with self._processes, self._place() as tell:
            queued_s = self._now() - queued_at
            message = await self._child.ask(ref, token, tell)
        if "error" in message:
            error = AdapterUnavailableError.from_json(message["error"])
            self._note_failure(ref, token, error, message.get("access"))
            raise error
        for key in self._failure_keys(ref, token):
            self._negative.succeeded(key)
        outcome = FetchOutcome(**message["outcome"])
        outcome.timings = {"queue": queued_s, **outcome.timings}
        self._warn(ref, outcome)
        return outcome

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[Callable[[Mapping[str, Any]], None]]:
        """Hold one of few places; a fetch whose source is slow leaves it to the next one.

        Gives what is to be called with the fetch's messages.
        """
        await self._slots.acquire()
        places, phase = [self._slots], ""

        def tell(message: Mapping[str, Any]) -> None:
            nonlocal phase
            phase = message.get("phase", phase)
            if "evicted" in message:
                log_eviction("disk", message["evicted"], message["bytes"])

        def leave() -> None:
            # What is verified computes, and that is what places are few for.
            if phase != "verify" and places:
                places.pop().release()

        timer = asyncio.get_running_loop().call_later(self._settings.place_s, leave)
        try:
            yield tell
        finally:
            timer.cancel()
            if places:
                places.pop().release()

    def _failure_keys(self, ref: AdapterRef, token: str | None) -> tuple[str, str]:
        # What is wrong with a public adapter is wrong for every token; an anonymous caller's
        # "not found" says nothing about callers with one.
        return ref.key, f"{ref.key} {self._hash(token)}"

    def _raise_known_failure(self, ref: AdapterRef, token: str | None) -> None:
        for key in self._failure_keys(ref, token):
            if (error := self._negative.get(key)) is not None:
                raise error

    def _warn(self, ref: AdapterRef, outcome: FetchOutcome) -> None:
        """Tell what is odd about an adapter, once for each of its contents."""
        key = (ref.key, outcome.digest)
        if key in self._told:
            return
        self._told[key] = None
        for warning in outcome.facts.get("warnings", ()):
            fields = {"fields": {"adapter": str(ref)}}
            logger.warning("adapter %s: %s", ref, warning, extra=fields)

    def _note_failure(
        self,
        ref: AdapterRef,
        token: str | None,
        error: AdapterUnavailableError,
        access: Access | None,
    ) -> None:
        everybodys, callers = self._failure_keys(ref, token)
        self._negative.failed(everybodys if access in ("public", "server") else callers, error)
        detail = without_secrets(error.detail, [token])
        # Most texts name the adapter themselves.
        named = error.text if str(ref) in error.text else f"adapter {ref}: {error.text}"
        logger.warning(
            "%s",
            named,
            extra={"fields": {"adapter": str(ref), **({"detail": detail} if detail else {})}},
        )

    def _fetched(self, ref: AdapterRef, outcome: FetchOutcome, lease: Lease) -> Fetched:
        entry = lease.entry
        return Fetched(
            ref=ref if outcome.id is None else replace(ref, id=outcome.id),
            version=outcome.version,
            digest=outcome.digest,
            folder=entry.folder,
            bytes=entry.size,
            files=tuple(file.name for file in entry.files),
            tokenizer_files=entry.tokenizer_files,
            facts=outcome.facts,
            access=outcome.access,
            timings=outcome.timings,
            downloaded=outcome.downloaded,
            stale=outcome.stale,
            valid_s=self._settings.valid_s,
            lease=lease,
        )
