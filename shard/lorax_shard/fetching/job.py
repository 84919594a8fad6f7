"""One fetch from beginning to end: resolve, download, verify, store. Runs in a child process."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from lorax_contract.adapters import (
    Access,
    AdapterRef,
    AdapterUnavailableError,
    Reason,
    key_of,
    refused,
)
from lorax_contract.errors import LoraxError
from lorax_shard.adapter_files import files_digest
from lorax_shard.fetching.sources.interface import (
    FetchContext,
    Resolved,
    Source,
    SourceSettings,
    check_announced,
    too_large,
)
from lorax_shard.store.index import NameRecord
from lorax_shard.store.store import AdapterStore, StoredAdapter

Phase = Literal["resolve", "wait", "download", "verify"]


class Verify(Protocol):
    """Reads an adapter's folder and says what it is.

    Returns facts that fit into JSON (rank, vocabulary size, …). Raises LoraxError or
    ValueError with a sentence for the caller when the adapter is not served. Must not
    change the folder.
    """

    def __call__(self, folder: Path, context: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the facts of the adapter in ``folder``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySettings:
    """Which function verifies adapters: a dotted path, so that sources do not import it."""

    # Like package.module:function; None: files are checked by their digests only.
    function: str | None = None
    # Handed to the function: the base model's shapes, limits, …
    context: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Verifier | None:
        """Import the function."""
        if self.function is None:
            return None
        module, _, name = self.function.partition(":")
        # A verdict holds for the function and what it was told.
        key = key_of(self.function, repr(sorted(self.context.items())))
        return Verifier(getattr(importlib.import_module(module), name), self.context, key)


@dataclass(frozen=True, slots=True)
class Verifier:
    """A loaded verification function with what it is told and a name for both."""

    function: Verify
    context: Mapping[str, Any]
    key: str

    def judge(self, ref: AdapterRef, folder: Path) -> dict[str, Any]:
        """Return the facts of the adapter in ``folder``; raises AdapterUnavailableError."""
        try:
            return dict(self.function(folder, self.context))
        except AdapterUnavailableError:
            raise
        except LoraxError as error:
            raise refused(f"adapter {ref}: {error.public}") from error
        except ValueError as error:
            raise refused(f"adapter {ref}: {error}") from error
        except MemoryError as error:
            text = f"adapter {ref}: reading it takes more memory than the server allows"
            raise AdapterUnavailableError(Reason.TOO_LARGE, text) from error


@dataclass(slots=True, kw_only=True)
class FetchOutcome:
    """What one fetch came to; crosses the pipe as JSON."""

    version: str
    digest: str
    access: Access
    facts: dict[str, Any]
    timings: dict[str, float]
    # Whether bytes came over the network (or from a local folder) for it.
    downloaded: bool = False
    # The source could not be asked; this is what it named last time.
    stale: bool = False


def make_source(kind: str, settings: SourceSettings) -> Source:
    """Return the source of a kind; unknown kinds are refused in words."""
    if kind == "local":
        from lorax_shard.fetching.sources.local import LocalSource

        return LocalSource(settings)
    if kind == "hub" and settings.hub_enabled:
        from lorax_shard.fetching.sources.hub import HubSource

        return HubSource(settings)
    if kind == "s3":
        from lorax_shard.fetching.sources.s3 import S3Source

        return S3Source(settings)
    if kind == "hub":
        raise refused("this server takes no adapters from the hub")
    raise refused(f"adapter_source {kind!r} is not known; there are hub, local and s3")


class FetchJob:
    """Carries one adapter through its phases and measures each."""

    def __init__(
        self,
        store: AdapterStore,
        source: Source,
        context: FetchContext,
        verifier: Verifier | None = None,
        *,
        clock: Callable[[], float] = time.time,
        on_phase: Callable[[Phase], None] = lambda _phase: None,
    ) -> None:
        self._store = store
        self._source = source
        self._context = context
        self._verifier = verifier
        self._clock = clock
        self._on_phase = on_phase
        self._timings: dict[str, float] = {}
        self._phase: tuple[Phase, float] | None = None
        # Set once it is known: whose token opened the adapter.
        self.access: Access | None = None

    def run(self, ref: AdapterRef, token: str | None) -> FetchOutcome:
        """Return where the adapter is; raises AdapterUnavailableError."""
        self._enter("resolve")
        try:
            resolved = self._source.resolve(ref, token, self._context)
        except AdapterUnavailableError as error:
            return self._last_known(ref, error)
        self.access = resolved.access
        version_key = key_of(self._source.realm, ref.source, ref.id, resolved.version)
        self._enter("wait")
        with self._store.fetching(version_key) as staging:
            entry, downloaded = self._known(version_key), False
            if entry is None:
                entry, downloaded = self._brought(ref, resolved, staging), True
            facts = self._facts(ref, entry)
            if resolved.lasting:
                self._context.on_step("record version")
                self._store.index.set_version(version_key, entry.digest)
            self._context.on_step("record name")
            self._store.index.set_name(self._record(ref, resolved, entry))
        return self._outcome(resolved.version, entry, facts, resolved.access, downloaded)

    def _record(self, ref: AdapterRef, resolved: Resolved, entry: StoredAdapter) -> NameRecord:
        return NameRecord(
            realm=self._source.realm,
            ref=ref,
            version=resolved.version,
            digest=entry.digest,
            access=resolved.access,
            checked_at=self._clock(),
        )

    def _known(self, version_key: str) -> StoredAdapter | None:
        digest = self._store.index.digest_of_version(version_key)
        return None if digest is None else self._store.entry(digest)

    def _brought(self, ref: AdapterRef, resolved: Resolved, staging: Path) -> StoredAdapter:
        """Download, verify and store; what can never be served is not left in the staging."""
        limits = self._context.limits
        try:
            self._store.make_room(check_announced(ref, resolved.files, limits), staging)
            self._enter("download")
            stored = self._source.fetch(ref, resolved, staging, self._context)
            total = sum(file.size for file in stored)
            if total > limits.max_total_bytes:
                raise too_large(ref, "it", total, limits.max_total_bytes)
            self._store.make_room(total, staging)
            # Before it becomes an entry: what is refused is not kept.
            facts = self._judged(ref, files_digest(stored), staging)
        except AdapterUnavailableError as error:
            if error.reason.permanent:
                for path in staging.iterdir():
                    path.unlink()
            raise
        entry = self._store.commit(staging, stored, self._cost())
        self._remember(entry.digest, facts)
        return entry

    def _facts(self, ref: AdapterRef, entry: StoredAdapter) -> dict[str, Any]:
        facts = self._judged(ref, entry.digest, entry.folder)
        self._remember(entry.digest, facts)
        return facts

    def _judged(self, ref: AdapterRef, digest: str, folder: Path) -> dict[str, Any]:
        """Return the verifier's facts, asked for once per content and verifier."""
        if self._verifier is None:
            return {}
        known = self._store.index.verdict(digest, self._verifier.key)
        if known is not None:
            return known
        self._enter("verify")
        return self._verifier.judge(ref, folder)

    def _remember(self, digest: str, facts: dict[str, Any]) -> None:
        if self._verifier and self._store.index.verdict(digest, self._verifier.key) is None:
            self._context.on_step("record verdict")
            self._store.index.set_verdict(digest, self._verifier.key, facts)

    def _last_known(self, ref: AdapterRef, error: AdapterUnavailableError) -> FetchOutcome:
        """Go on with what the name led to while its source is out of reach.

        Not for adapters that a token opened: whether this caller may use them is what the
        source cannot say now.
        """
        record = self._store.index.name(self._source.realm, ref)
        if record is None or record.access == "token":
            raise error
        if error.reason.permanent:
            # It is gone, or private now: a later outage must not bring it back.
            self._store.index.forget_name(self._source.realm, ref)
            raise error
        entry = self._store.entry(record.digest)
        if entry is None:
            raise error
        self.access = record.access
        facts = self._facts(ref, entry)
        outcome = self._outcome(record.version, entry, facts, record.access, False)
        outcome.stale = True
        return outcome

    def _outcome(
        self,
        version: str,
        entry: StoredAdapter,
        facts: dict[str, Any],
        access: Access,
        downloaded: bool,
    ) -> FetchOutcome:
        self._leave()
        return FetchOutcome(
            version=version,
            digest=entry.digest,
            access=access,
            facts=facts,
            timings=dict(self._timings),
            downloaded=downloaded,
        )

    def _cost(self) -> float:
        self._leave()
        return self._timings.get("resolve", 0.0) + self._timings.get("download", 0.0)

    def _enter(self, phase: Phase) -> None:
        self._leave()
        self._phase = (phase, self._context.now())
        self._on_phase(phase)

    def _leave(self) -> None:
        if self._phase is not None:
            phase, since = self._phase
            spent = self._context.now() - since
            self._timings[phase] = self._timings.get(phase, 0.0) + spent
            self._phase = None
