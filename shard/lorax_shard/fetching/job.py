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
from lorax_shard.files import size_of
from lorax_shard.giving_way import in_slices
from lorax_shard.store.index import NameRecord
from lorax_shard.store.staging import Staging
from lorax_shard.store.store import AdapterStore, StoredAdapter

Phase = Literal["resolve", "wait", "download", "verify"]

# The fact that names what was derived from an adapter's files.
_DERIVED = "derived"


class Verify(Protocol):
    """Reads an adapter's folder and says what it is.

    Returns facts that fit into JSON (rank, vocabulary size, …). Raises LoraxError or
    ValueError with a sentence for the caller when the adapter is not served. Must not
    change the folder. What it writes into ``target``, a folder of its own, is kept with the
    adapter under the name that the facts give as ``derived``.
    """

    def __call__(self, folder: Path, target: Path, context: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the facts of the adapter in ``folder``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySettings:
    """Which function verifies adapters: a dotted path, so that sources do not import it."""

    # Like package.module:function; None: files are checked by their digests only.
    function: str | None = None
    # Handed to the function: the base model's shapes, limits, …
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names the function and what it is told: a verdict, and what was derived, hold for it."""
        return key_of(self.function, repr(sorted(self.context.items())))

    def load(self) -> Verifier | None:
        """Import the function, and have its module prepare for what it will be told."""
        if self.function is None:
            return None
        path, _, name = self.function.partition(":")
        module = importlib.import_module(path)
        if (prepare := getattr(module, "prepare", None)) is not None:
            prepare(self.context)
        return Verifier(getattr(module, name), self.context, self.key)


@dataclass(frozen=True, slots=True)
class Verifier:
    """A loaded verification function with what it is told and a name for both."""

    function: Verify
    context: Mapping[str, Any]
    key: str
    # Told of the folder before anything in it is read.
    before: Callable[[Path], None] = lambda _folder: None

    def judge(self, ref: AdapterRef, folder: Path, target: Path) -> dict[str, Any]:
        """Return the facts of the adapter in ``folder``; raises AdapterUnavailableError."""
        try:
            self.before(folder)
            return dict(self.function(folder, target, self.context))
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
    # The one spelling of the id, where the source takes several; None: as it was asked for.
    id: str | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """An entry with its verdict."""

    entry: StoredAdapter
    facts: dict[str, Any]
    downloaded: bool = False


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
        version = self._version_key(ref, resolved.version)
        found = self._ready(version)
        if found is not None:
            self._note(ref, version, resolved, found)
        else:
            self._enter("wait")
            with self._store.fetching(version) as staging:
                found = self._ready(version) or self._brought(ref, version, resolved, staging)
                # Before others who wait for this version look whether it is known.
                self._note(ref, version, resolved, found)
        outcome = self._outcome(resolved.version, found, resolved.access)
        outcome.id = resolved.id
        return outcome

    def _note(self, ref: AdapterRef, version: str, resolved: Resolved, found: _Found) -> None:
        self._context.on_step("record name")
        name = NameRecord(
            realm=self._source.realm,
            ref=ref,
            version=resolved.version,
            digest=found.entry.digest,
            access=resolved.access,
            checked_at=self._clock(),
        )
        self._store.index.wanted(name, version if resolved.lasting else None)

    def _version_key(self, ref: AdapterRef, version: str) -> str:
        return key_of(self._source.realm, ref.source, ref.id, version)

    def _known(self, version: str) -> StoredAdapter | None:
        digest = self._store.index.digest_of_version(version)
        return None if digest is None else self._store.entry(digest)

    def _ready(self, version: str) -> _Found | None:
        """Return what a version is if it is here and has its verdict."""
        entry = self._known(version)
        facts = None if entry is None else self._verdict(entry)
        return None if entry is None or facts is None else _Found(entry, facts)

    def _verdict(self, entry: StoredAdapter) -> dict[str, Any] | None:
        """Return what is known of an entry: nothing, if what was derived from it is gone."""
        if self._verifier is None:
            return {}
        facts = self._store.index.verdict(entry.digest, self._verifier.key)
        if facts is not None and _DERIVED in facts and not entry.has_derived(facts[_DERIVED]):
            return None
        return facts

    def _brought(
        self, ref: AdapterRef, version: str, resolved: Resolved, staging: Staging
    ) -> _Found:
        """Download, verify and store; what can never be served is not left in the staging."""
        size = sum(file.size or 0 for file in resolved.files)
        patience_s = self._context.deadline - self._context.now()
        try:
            with in_slices(size, patience_s):
                entry = self._known(version)
                if entry is not None:
                    return _Found(entry, self._judged(ref, entry, staging))
                return self._downloaded(ref, resolved, staging)
        except AdapterUnavailableError as error:
            if error.reason.permanent:
                staging.clear()
            raise

    def _downloaded(self, ref: AdapterRef, resolved: Resolved, staging: Staging) -> _Found:
        limits = self._context.limits
        self._store.make_room(check_announced(ref, resolved.files, limits), staging)
        self._enter("download")
        stored = self._source.fetch(ref, resolved, staging.folder, self._context)
        total = sum(file.size for file in stored)
        if total > limits.max_total_bytes:
            raise too_large(f"adapter {ref}", "it", total, limits.max_total_bytes)
        self._store.make_room(total, staging)
        present = self._store.entry(files_digest(stored))
        facts = None if present is None else self._verdict(present)
        if facts is None:
            # Before it becomes an entry: what is refused is not kept.
            facts = self._judge(ref, staging.folder, staging)
        derived = facts.get(_DERIVED)
        entry = self._store.commit(staging, stored, self._cost(), derived)
        self._keep(entry, facts, staging)
        return _Found(entry, facts, downloaded=True)

    def _judged(self, ref: AdapterRef, entry: StoredAdapter, staging: Staging) -> dict[str, Any]:
        """Return the verdict on an entry, asked for once per content and verifier."""
        facts = self._verdict(entry)
        if facts is None:
            facts = self._judge(ref, entry.folder, staging)
            self._keep(entry, facts, staging)
        return facts

    def _judge(self, ref: AdapterRef, folder: Path, staging: Staging) -> dict[str, Any]:
        """Have a folder verified; what is derived from it lies in the staging then."""
        if self._verifier is None:
            return {}
        self._enter("verify")
        with staging.deriving() as target:
            facts = self._verifier.judge(ref, folder, target)
            if _DERIVED in facts:
                staging.name_derived(facts[_DERIVED])
        self._store.make_room(size_of(staging.folder), staging)
        return facts

    def _keep(self, entry: StoredAdapter, facts: dict[str, Any], staging: Staging) -> None:
        """Have a verdict remembered, and what was derived lie with its entry."""
        if self._verifier is None:
            return
        if _DERIVED in facts and (staging.folder / facts[_DERIVED]).is_dir():
            self._store.add_derived(staging, entry, facts[_DERIVED])
        self._context.on_step("record verdict")
        self._store.index.set_verdict(entry.digest, self._verifier.key, facts)

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
        facts = self._verdict(entry)
        if facts is None:
            with self._store.fetching(self._version_key(ref, record.version)) as staging:
                facts = self._judged(ref, entry, staging)
        outcome = self._outcome(record.version, _Found(entry, facts), record.access)
        outcome.stale = True
        return outcome

    def _outcome(self, version: str, found: _Found, access: Access) -> FetchOutcome:
        self._leave()
        return FetchOutcome(
            version=version,
            digest=found.entry.digest,
            access=access,
            facts=found.facts,
            timings=dict(self._timings),
            downloaded=found.downloaded,
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
