"""Adapters by name, for the process that holds the model: ask, wait, get a folder.

    fetcher = AdapterFetcher(settings)
    fetched = await fetcher.fetch(AdapterRef.of("hub", "org/name"), token)
    with fetched:                       # the lease: the folder stays meanwhile
        parse(fetched.folder)
    await fetcher.close()

Everything slow or dangerous happens in the child process (fetch_process). Here are only
the memory of what names led to, of failures and of who was let in, and the bookkeeping
that makes many requests for one adapter wait for one fetch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lorax_contract.adapters import Access, AdapterRef, AdapterUnavailableError, Reason, refused
from lorax_shard.adapter_files import TEMPLATE_FILES
from lorax_shard.fetching.access import AccessBook
from lorax_shard.fetching.child import ChildLost, FetchChild
from lorax_shard.fetching.job import FetchOutcome
from lorax_shard.fetching.negative import NegativeCache, NegativeSettings
from lorax_shard.fetching.process import Setup
from lorax_shard.fetching.redact import without_secrets
from lorax_shard.store.store import AdapterStore, Lease

logger = logging.getLogger(__name__)

# The child ends a fetch at its deadline; this much later the child itself counts as hung.
_BACKSTOP_S = 30.0
_MAX_TOKEN_LENGTH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSettings:
    """What the fetcher is told."""

    setup: Setup
    # Fetches at the same time, those apart that have waited for their source for long: at
    # most so many times more of them.
    concurrency: int = 8
    place_s: float = 3.0
    slow_factor: int = 8
    # Names are asked for again after this long, and whenever somebody says so.
    refresh_interval_s: float = 300.0
    # How long a source's "yes" to a caller's token is remembered.
    acceptance_s: float = 300.0
    negative: NegativeSettings = field(default_factory=NegativeSettings)
    max_names: int = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """An adapter on this host's disk. It stays there until it is released."""

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


@dataclass(slots=True, kw_only=True)
class FetchProgress:
    """A fetch under way, for lists."""

    ref: AdapterRef
    phase: str = "queue"
    bytes: int = 0


@dataclass(slots=True)
class _Flight:
    """One fetch that any number of callers wait for."""

    task: asyncio.Task[FetchOutcome]
    progress: FetchProgress
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Known:
    """What a name led to when this process last asked."""

    outcome: FetchOutcome
    since: float


class AdapterFetcher:
    """The store's client in one process. Used from one event loop."""

    def __init__(
        self, settings: FetchSettings, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.store: AdapterStore = settings.setup.open_store()
        self.access = AccessBook(settings.acceptance_s, now=now)
        self._settings = settings
        self._now = now
        self._negative = NegativeCache(settings.negative, now=now)
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._flights: dict[tuple[str, str, bool], _Flight] = {}
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._processes = asyncio.Semaphore(settings.concurrency * settings.slow_factor)
        self._child: FetchChild | None = None
        self._child_lock = asyncio.Lock()
        self._early_start: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Start the child process in the background, so that the first fetch finds it running."""
        if self._early_start is None and not self._closed:
            self._early_start = asyncio.create_task(self._start_early(), name="fetcher start")

    async def fetch(
        self, ref: AdapterRef, token: str | None = None, *, refresh: bool = False
    ) -> Fetched:
        """Return the adapter that ``ref`` names for a caller with ``token``.

        ``refresh`` asks the source even if the name was asked for a moment ago, and tries
        again what failed a moment ago. Raises AdapterUnavailableError. Cancelling ends the
        fetch unless others wait for it too.
        """
        token = _checked(token)
        if not refresh:
            fetched = await self._from_memory(ref, token)
            if fetched is not None:
                return fetched
            self._raise_known_failure(ref, token)
        # Twice: another process may evict the entry between the answer and the lease.
        for _ in range(2):
            outcome = await self._joined(ref, token, refresh)
            fetched = await self._leased(ref, token, outcome)
            if fetched is not None:
                return fetched
        raise AdapterUnavailableError(
            Reason.STORE_FULL, f"adapter {ref} was evicted as soon as it was fetched"
        )

    def in_flight(self) -> list[FetchProgress]:
        """Return the fetches under way."""
        return [dataclasses.replace(flight.progress) for flight in self._flights.values()]

    def forget(self, ref: AdapterRef) -> None:
        """Ask the source anew at the next fetch of ``ref``, whatever was known or went wrong."""
        self._known.pop(ref.key, None)
        self.access.forget(ref)
        self._negative.forget(ref.key)

    async def close(self) -> None:
        """End the child process; fetches under way fail."""
        self._closed = True
        tasks: list[asyncio.Task[Any]] = [flight.task for flight in self._flights.values()]
        if self._early_start is not None:
            tasks.append(self._early_start)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with self._child_lock:
            if self._child is not None:
                await self._child.end()
                self._child = None

    async def _from_memory(self, ref: AdapterRef, token: str | None) -> Fetched | None:
        """Return the adapter without asking anybody, if that is allowed."""
        known = self._known.get(ref.key)
        if known is None or self._now() - known.since >= self._settings.refresh_interval_s:
            return None
        if known.outcome.access == "token" and not self.access.is_accepted(ref, token):
            return None
        outcome = dataclasses.replace(known.outcome, timings={}, downloaded=False)
        return await self._leased(ref, token, outcome)

    def _raise_known_failure(self, ref: AdapterRef, token: str | None) -> None:
        # What is wrong with a public adapter is wrong for every token.
        for key in {ref.key, self._failure_key(ref, token)}:
            if (error := self._negative.get(key)) is not None:
                raise error

    def _failure_key(self, ref: AdapterRef, token: str | None) -> str:
        # An anonymous caller's "not found" says nothing about callers with a token.
        return f"{ref.key} {self.access.hash(token)}"

    async def _joined(self, ref: AdapterRef, token: str | None, refresh: bool) -> FetchOutcome:
        """Wait for the one fetch of this name with this token."""
        key = (ref.key, self.access.hash(token), refresh)
        flight = self._flights.get(key)
        if flight is None:
            if self._closed:
                raise AdapterUnavailableError(Reason.TRANSIENT, "the server is shutting down")
            progress = FetchProgress(ref=ref)
            task = asyncio.create_task(self._fetched(ref, token, progress), name=f"fetch {ref}")
            flight = self._flights[key] = _Flight(task, progress)
            task.add_done_callback(lambda _task: self._flights.pop(key, None))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.task.cancelled():
                raise AdapterUnavailableError(
                    Reason.TRANSIENT, f"the fetch of adapter {ref} was ended"
                ) from None
            raise
        finally:
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.task.done():
                # Whoever asks from now on starts anew.
                self._flights.pop(key, None)
                flight.task.cancel()

    async def _fetched(
        self, ref: AdapterRef, token: str | None, progress: FetchProgress
    ) -> FetchOutcome:
        queued_at = self._now()
        async with self._processes, self._place(progress):
            queued_s = self._now() - queued_at
            message = await self._asked(ref, token, progress)
        if "error" in message:
            error = AdapterUnavailableError.from_json(message["error"])
            self._note_failure(ref, token, error, message.get("access"))
            raise error
        outcome = FetchOutcome(**message["outcome"])
        outcome.timings = {"queue": queued_s, **outcome.timings}
        self._note_success(ref, token, outcome)
        return outcome

    @contextlib.asynccontextmanager
    async def _place(self, progress: FetchProgress) -> AsyncIterator[None]:
        """Hold one of few places; a fetch whose source is slow leaves it to the next one."""
        await self._slots.acquire()
        places = [self._slots]

        def leave() -> None:
            # What is verified computes, and that is what places are few for.
            if progress.phase != "verify" and places:
                places.pop().release()

        timer = asyncio.get_running_loop().call_later(self._settings.place_s, leave)
        try:
            yield
        finally:
            timer.cancel()
            if places:
                places.pop().release()

    async def _asked(
        self, ref: AdapterRef, token: str | None, progress: FetchProgress
    ) -> Mapping[str, Any]:
        """Ask the child; one that dies is restarted, and asked once more."""

        def tell(message: Mapping[str, Any]) -> None:
            progress.phase = str(message.get("phase", progress.phase))
            progress.bytes = int(message.get("bytes", progress.bytes))

        command = {"ref": dataclasses.asdict(ref), "token": token}
        backstop_s = self._settings.setup.process.deadline_s + _BACKSTOP_S
        for _ in range(2):
            try:
                child = await self._running_child()
                message: Mapping[str, Any] = await child.ask(command, tell, backstop_s)
                return message
            except ChildLost:
                logger.warning("the process that fetches adapters ended; it is started again")
            except AdapterUnavailableError as error:
                return {"error": error.to_json()}
        lost = AdapterUnavailableError(
            Reason.CRASHED, f"adapter {ref}: the process that fetches adapters ended twice"
        )
        return {"error": lost.to_json()}

    async def _start_early(self) -> None:
        try:
            await self._running_child()
        except (AdapterUnavailableError, OSError) as error:
            logger.warning("%s; the next fetch tries again", error)

    async def _running_child(self) -> FetchChild:
        async with self._child_lock:
            if self._child is not None and self._child.is_lost:
                await self._child.end()
                self._child = None
            if self._child is None:
                self._child = await FetchChild.start(self._settings.setup)
            return self._child

    def _note_success(self, ref: AdapterRef, token: str | None, outcome: FetchOutcome) -> None:
        self._negative.succeeded(self._failure_key(ref, token))
        self._negative.succeeded(ref.key)
        if outcome.access == "token" and token is not None:
            self.access.accept(ref, token)
        self._known[ref.key] = _Known(outcome, self._now())
        self._known.move_to_end(ref.key)
        while len(self._known) > self._settings.max_names:
            self._known.popitem(last=False)

    def _note_failure(
        self,
        ref: AdapterRef,
        token: str | None,
        error: AdapterUnavailableError,
        access: Access | None,
    ) -> None:
        public = access in ("public", "server")
        self._negative.failed(ref.key if public else self._failure_key(ref, token), error)
        if error.reason in (Reason.NO_ACCESS, Reason.NOT_FOUND):
            self.access.refuse(ref, token)
        detail = without_secrets(error.detail, [token])
        logger.warning(
            "adapter %s: %s",
            ref,
            error.text,
            extra={"fields": {"adapter": str(ref), **_some(detail)}},
        )

    def _valid_s(self, ref: AdapterRef, token: str | None, access: Access) -> float:
        known = self._known.get(ref.key)
        if known is None:
            return 0.0
        left = known.since + self._settings.refresh_interval_s - self._now()
        if access == "token":
            left = min(left, self.access.remaining_s(ref, token))
        return max(0.0, left)

    async def _leased(
        self, ref: AdapterRef, token: str | None, outcome: FetchOutcome
    ) -> Fetched | None:
        lease = await _in_thread(self.store.lease, outcome.digest)
        if lease is None:
            self._known.pop(ref.key, None)
            return None
        entry = lease.entry
        return Fetched(
            ref=ref,
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
            valid_s=self._valid_s(ref, token, outcome.access),
            lease=lease,
        )


async def _in_thread(take: Callable[[str], Lease | None], digest: str) -> Lease | None:
    """Take a lease in a thread; one that arrives after a cancellation is given back."""
    task = asyncio.ensure_future(asyncio.to_thread(take, digest))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_give_back)
        raise


def _give_back(task: asyncio.Future[Lease | None]) -> None:
    with contextlib.suppress(asyncio.CancelledError, Exception):
        lease = task.result()
        if lease is not None:
            lease.release()


def _some(detail: str) -> dict[str, str]:
    return {"detail": detail} if detail else {}


def _checked(token: str | None) -> str | None:
    """Return a token that can be sent; an empty one is none."""
    if not token:
        return None
    if len(token) > _MAX_TOKEN_LENGTH or not token.isascii() or not token.isprintable():
        raise refused("the api_token has characters that no token has, or is too long")
    if " " in token:
        raise refused("the api_token has spaces, which no token has")
    return token
