"""The adapters on this host's disk: content-addressed, shared by all processes that open it.

    entries/<digest>/     files of one adapter and entry.json; appears and goes by one rename
    staging/<version>/    a fetch under way or broken off, one per concrete version
    names/ versions/ verdicts/ uses/ pins/      records (store_index)
    locks/                one file per version, per entry and for the store as a whole
    trash/                folders on their way out

Invariants: an entry that is visible is whole. Who writes staging/<version> holds the lock
of that version. Who removes an entry holds its lock alone; who reads one shares it (a
lease). Who publishes one keeps removers out, and others who publish it. Locks belong to
the kernel: a process that is killed holds none.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_shard import files
from lorax_shard.adapter_files import TEMPLATE_FILES, TOKENIZER_FILES, StoredFile, files_digest
from lorax_shard.store.eviction import Candidate, decayed, order
from lorax_shard.store.index import StoreIndex

_ENTRY_FILE = "entry.json"
# A broken-off fetch that nobody took up again for this long is dropped.
_STAGING_LIFE_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """An adapter in the store."""

    digest: str
    folder: Path
    files: tuple[StoredFile, ...]
    # Seconds that resolving and fetching it took.
    cost_s: float
    created_s: float

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the tokenizer's files, chat templates included."""
        own = (*TOKENIZER_FILES, *TEMPLATE_FILES)
        return tuple(file.name for file in self.files if file.name in own)


class Lease:
    """Keeps one entry on the disk while its holder reads it."""

    def __init__(self, entry: StoredAdapter, lock: files.FileLock) -> None:
        self.entry = entry
        self._lock = lock

    def release(self) -> None:
        """Let the entry go when its turn comes; more than once does nothing."""
        self._lock.release()

    def __enter__(self) -> StoredAdapter:
        return self.entry

    def __exit__(self, *_: object) -> None:
        self.release()


def _ignore(_step: str) -> None:
    """Do nothing at a named step."""


class AdapterStore:
    """One folder of adapters, bounded in bytes. Safe for any number of processes."""

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
        on_step: Callable[[str], None] = _ignore,
    ) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.index = StoreIndex(root)
        self._clock = clock
        # Called before each change of the disk; tests end the process here.
        self._on_step = on_step
        for name in ("entries", "staging", "locks", "trash"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self.index.create()

    def entry(self, digest: str) -> StoredAdapter | None:
        """Return a whole entry; None if there is none. One with a damaged file counts as none."""
        entry = self._read(self._folder(digest))
        return entry if entry is not None and _is_whole(entry) else None

    def entries(self) -> list[StoredAdapter]:
        """Return all entries."""
        found = (self.entry(path.name) for path in sorted((self.root / "entries").iterdir()))
        return [entry for entry in found if entry is not None]

    def lease(self, digest: str) -> Lease | None:
        """Keep an entry from being evicted and count the use; None: it is not there."""
        lock = files.acquire(self._entry_lock(digest), shared=True)
        assert lock is not None
        entry = self.entry(digest)
        if entry is None:
            lock.release()
            return None
        self.index.count_use(digest, self._clock())
        return Lease(entry, lock)

    def remove(self, digest: str) -> bool:
        """Remove an entry now; False if somebody reads it. Its pin goes with it."""
        lock = files.acquire(self._entry_lock(digest), wait=False)
        if lock is None:
            return False
        try:
            self._on_step("remove entry")
            files.discard(self._folder(digest), self.root / "trash", self._on_step)
            self.index.unpin(digest)
        finally:
            lock.release()
        return True

    @contextlib.contextmanager
    def fetching(self, version_key: str) -> Iterator[Path]:
        """Hold a version's lock, so that it is fetched once, and give its staging folder."""
        with files.locked(self.root / "locks" / f"version-{version_key}"):
            folder = self.root / "staging" / version_key
            self._on_step("make staging")
            folder.mkdir(exist_ok=True)
            try:
                yield folder
            finally:
                # Only if it is empty: what a broken-off fetch left is taken up later.
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def commit(self, staging: Path, stored: Iterable[StoredFile], cost_s: float) -> StoredAdapter:
        """Make a staged folder an entry; if its content is here already, that entry stays."""
        stored = tuple(sorted(stored, key=lambda file: file.name))
        digest = files_digest(stored)
        wanted = {file.name for file in stored}
        # Looked at before it is locked alone: readers may hold it for as long as they like.
        if (lease := self.lease(digest)) is not None:
            with lease as present:
                return self._drop_equal(staging, present)
        with self._publishing(digest):
            if (faster := self.entry(digest)) is not None:
                return self._drop_equal(staging, faster)
            for path in staging.iterdir():
                if path.name not in wanted:
                    path.unlink()
            entry = StoredAdapter(
                digest=digest,
                folder=self._folder(digest),
                files=stored,
                cost_s=cost_s,
                created_s=self._clock(),
            )
            self._publish(staging, entry)
            self.index.count_use(digest, self._clock())
        return entry

    @contextlib.contextmanager
    def _publishing(self, digest: str) -> Iterator[None]:
        """Keep others from publishing or removing an entry that is not there whole.

        Whoever still reads what was lost is not waited for: that may be for ever.
        """
        path = self._entry_lock(digest)
        with files.locked(self.root / "locks" / f"publish-{digest}"):
            # Readers share the lock; only one who removes the entry keeps it from being shared.
            lock = files.acquire(path, wait=False) or files.acquire(path, shared=True)
            assert lock is not None
            try:
                yield
            finally:
                lock.release()

    def _drop_equal(self, staging: Path, present: StoredAdapter) -> StoredAdapter:
        self._on_step("drop equal content")
        files.discard(staging, self.root / "trash", self._on_step)
        return present

    def _publish(self, staging: Path, entry: StoredAdapter) -> None:
        self._on_step("write entry")
        facts = {
            "files": [asdict(file) for file in entry.files],
            "cost_s": entry.cost_s,
            "created_s": entry.created_s,
        }
        files.write_json(staging / _ENTRY_FILE, facts)
        self._on_step("sync entry")
        files.sync_files(staging)
        # What lies there is damaged, or it would have been found.
        files.discard(entry.folder, self.root / "trash", self._on_step)
        self._on_step("publish entry")
        staging.rename(entry.folder)
        self._on_step("sync entries")
        files.sync_folder(entry.folder.parent)

    def make_room(self, size: int, staging: Path | None = None) -> None:
        """Evict until ``size`` more bytes fit; raises when pinned and used entries fill it."""
        if size > self.max_bytes:
            raise self._no_room(size)
        with files.locked(self.root / "locks" / "store"):
            free = self.max_bytes - self._used(staging)
            if free >= size:
                return
            for path in self._idle_staging(staging, life_s=0.0):
                free += self._drop_staging(path)
                if free >= size:
                    return
            entries = {entry.digest: entry for entry in self.entries()}
            for digest in order(self._candidates(entries.values())):
                if self.remove(digest):
                    free += entries[digest].size
                if free >= size:
                    return
        raise self._no_room(size)

    def used_bytes(self) -> int:
        """Return the bytes of all entries and of fetches under way."""
        return self._used(None)

    def sweep(self) -> None:
        """Remove what processes that were killed left behind. Leaves running fetches alone."""
        with files.locked(self.root / "locks" / "store"):
            for path in (self.root / "trash").iterdir():
                shutil.rmtree(path, ignore_errors=True)
            for path in self._idle_staging(None, life_s=_STAGING_LIFE_S):
                self._drop_staging(path)
            for path in (self.root / "entries").iterdir():
                if self.entry(path.name) is None:
                    self.remove(path.name)
            self.index.drop_orphans(lambda digest: self.entry(digest) is not None, self._clock())
            for path in (self.root / "locks").iterdir():
                if path.name != "store":
                    files.remove_unused_lock(path)

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; reads every byte of every entry."""
        import hashlib

        for path in (self.root / "entries").iterdir():
            entry = self.entry(path.name)
            assert entry is not None, f"{path.name} is visible and not whole"
            assert files_digest(entry.files) == entry.digest, f"{path.name} is misnamed"
            names = {file.name for file in entry.files} | {_ENTRY_FILE}
            assert {item.name for item in path.iterdir()} == names, f"{path.name}: stray files"
            for file in entry.files:
                content = hashlib.sha256((path / file.name).read_bytes()).hexdigest()
                assert content == file.sha256, f"{path.name}: {file.name} is damaged"

    def _candidates(self, entries: Iterable[StoredAdapter]) -> list[Candidate]:
        now, found = self._clock(), []
        for entry in entries:
            if self.index.is_pinned(entry.digest):
                continue
            use = self.index.use(entry.digest)
            idle_s = now - (use.last_s if use else entry.created_s)
            found.append(
                Candidate(
                    digest=entry.digest,
                    size=entry.size,
                    cost_s=entry.cost_s,
                    idle_s=idle_s,
                    uses=decayed(use.uses, idle_s) if use else 0.0,
                )
            )
        return found

    def _used(self, apart_from: Path | None) -> int:
        staged = (path for path in (self.root / "staging").iterdir() if path != apart_from)
        return sum(entry.size for entry in self.entries()) + sum(map(files.size_of, staged))

    def _idle_staging(self, apart_from: Path | None, life_s: float) -> list[Path]:
        """Return staged folders that nobody fetches into and that are old enough."""
        found = []
        for path in (self.root / "staging").iterdir():
            with contextlib.suppress(FileNotFoundError):
                newest = max((item.stat().st_mtime for item in path.iterdir()), default=0.0)
                is_old = life_s <= 0.0 or self._clock() - newest >= life_s
                if is_old and path != apart_from:
                    found.append(path)
        return found

    def _drop_staging(self, path: Path) -> int:
        """Remove a staged folder unless somebody fetches into it; return the bytes freed."""
        lock = files.acquire(self.root / "locks" / f"version-{path.name}", wait=False)
        if lock is None:
            return 0
        try:
            size = files.size_of(path)
            files.discard(path, self.root / "trash", self._on_step)
        finally:
            lock.release()
        return size

    def _no_room(self, size: int) -> AdapterUnavailableError:
        return AdapterUnavailableError(
            Reason.STORE_FULL,
            f"the adapter store has no room for {size:,} bytes: it holds {self._used(None):,} of "
            f"{self.max_bytes:,}, and what is pinned or in use stays",
        )

    def _folder(self, digest: str) -> Path:
        return self.root / "entries" / digest

    def _entry_lock(self, digest: str) -> Path:
        return self.root / "locks" / f"entry-{digest}"

    def _read(self, folder: Path) -> StoredAdapter | None:
        document: dict[str, Any] | None = files.read_json(folder / _ENTRY_FILE)
        try:
            if document is None:
                return None
            return StoredAdapter(
                digest=folder.name,
                folder=folder,
                files=tuple(StoredFile(**file) for file in document["files"]),
                cost_s=float(document["cost_s"]),
                created_s=float(document["created_s"]),
            )
        except (KeyError, TypeError, ValueError):
            return None


def _is_whole(entry: StoredAdapter) -> bool:
    for file in entry.files:
        try:
            if (entry.folder / file.name).stat().st_size != file.size:
                return False
        except OSError:
            return False
    return True
