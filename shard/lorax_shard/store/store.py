"""The adapters on this host's disk: content-addressed, shared by all processes that open it.

    entries/<digest>/     files of one adapter and entry.json; appears and goes by one rename
        <name>/           what a verifier derived from them; appears by one rename
    staging/<version>/    a fetch under way or broken off, one per concrete version
    index.sqlite3         sizes, uses, names, versions, verdicts, reservations (index.py)
    locks/                one file per lock that is held
    trash/                folders on their way out

Invariants: an entry that is visible is whole, and so is what is derived from it. Who writes
staging/<version> holds the lock of that version. Who removes an entry holds its lock alone;
who reads one shares it (a lease). Who publishes one keeps removers out, and others who
publish it. Locks belong to the kernel: a process that is killed holds none.

The folders are the truth, the index what is counted of them: an entry gets its row before
it appears and loses it after it went, so a process that is killed between the two leaves
bytes counted that are not there, never the reverse. Opened anew, a store puts that right.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_shard import files
from lorax_shard.adapter_files import TEMPLATE_FILES, TOKENIZER_FILES, StoredFile, files_digest
from lorax_shard.store.index import BEFORE_ALL, IndexRow, StoreIndex
from lorax_shard.store.staging import Staging, StagingArea

_FOLDERS = ("entries", "staging", "locks", "trash")
_ENTRY_FILE = "entry.json"
# Of an entry: a digest, or what lies among them by mistake.
_NAME = re.compile(r"\w[\w.-]{0,63}", re.ASCII)
# Folders of records that the index has taken the place of.
_FORMER_FOLDERS = ("names", "versions", "verdicts", "uses", "pins")


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
        """Bytes of its files; what is derived from them is not counted."""
        return sum(file.size for file in self.files)

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the tokenizer's files, chat templates included."""
        own = (*TOKENIZER_FILES, *TEMPLATE_FILES)
        return tuple(file.name for file in self.files if file.name in own)

    def has_derived(self, name: str) -> bool:
        """Tell whether something of this name was derived from the files."""
        return (self.folder / name).is_dir()


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


def _is_name(digest: str) -> bool:
    """Return whether an entry can have this name; another one may lead elsewhere as a path."""
    return _NAME.fullmatch(digest) is not None


def _ignore(*_: object) -> None:
    """Nobody wants to hear of it."""


class AdapterStore:
    """One folder of adapters, bounded in bytes. Safe for any number of processes.

    ``on_evict`` hears of each entry that made room for others: its digest and its bytes.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
        on_step: Callable[[str], None] = _ignore,
        on_evict: Callable[[str, int], None] = _ignore,
    ) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._clock = clock
        # Called before each change of the disk; tests end the process here.
        self._on_step = on_step
        self._on_evict = on_evict
        _make_private(root)
        for name in _FOLDERS:
            (root / name).mkdir(exist_ok=True)
        self.index = StoreIndex(root / "index.sqlite3", self._lock("index"), self._rows)
        self._staging = StagingArea(root, self.index, clock, on_step)

    def open(self) -> None:
        """Open the index now, for as long as the process lives; not in one that forks.

        While nobody has it open, everybody who opens it reads all that was written last.
        Raises OSError if the store cannot be written.
        """
        for name in _FOLDERS:
            files.check_writable(self.root / name)
        files.check_writable(self.root)
        self.index.used_bytes()

    # --- entries ----------------------------------------------------------------------

    def entry(self, digest: str) -> StoredAdapter | None:
        """Return a whole entry; None if there is none. One with a damaged file counts as none."""
        if not _is_name(digest):
            return None
        entry = self._read(self._folder(digest))
        return entry if entry is not None and _is_whole(entry) else None

    def entries(self) -> list[StoredAdapter]:
        """Return all entries; reads every one of them."""
        found = (self.entry(path.name) for path in sorted((self.root / "entries").iterdir()))
        return [entry for entry in found if entry is not None]

    def lease(self, digest: str) -> Lease | None:
        """Keep an entry from being evicted; None: it is not there."""
        if not _is_name(digest):
            return None
        lock = files.acquire(self._entry_lock(digest), shared=True)
        assert lock is not None
        entry = self.entry(digest)
        if entry is None:
            lock.release()
            return None
        return Lease(entry, lock)

    def count_use(self, digest: str) -> None:
        """Note that an entry was read because it was wanted."""
        self.index.count_use(digest, self._clock())

    def remove(self, digest: str) -> bool:
        """Remove an entry now; False if somebody reads it."""
        if not _is_name(digest):
            return True
        lock = files.acquire(self._entry_lock(digest), wait=False)
        if lock is None:
            return False
        try:
            self._on_step("remove entry")
            files.discard(self._folder(digest), self.root / "trash", self._on_step)
            self.index.drop(digest)
        finally:
            lock.release()
        return True

    def used_bytes(self) -> int:
        """Return the bytes of all entries and of fetches under way."""
        return self.index.used_bytes()

    # --- fetches ------------------------------------------------------------------------

    def fetching(self, version: str) -> AbstractContextManager[Staging]:
        """Hold a version's lock, so that it is fetched once, and give its staging folder."""
        return self._staging.fetching(version)

    def make_room(self, size: int, staging: Staging) -> None:
        """Keep ``size`` bytes for a fetch, evicting others until they are free.

        Raises AdapterUnavailableError when what is in use leaves too little.
        """
        if size > self.max_bytes:
            raise self._no_room(size)
        now = self._clock()
        broken_off = iter(self._staging.others(staging.version))
        place = BEFORE_ALL
        while not self.index.reserve(staging.version, size, self.max_bytes, now):
            if (version := next(broken_off, None)) is not None:
                self._staging.drop(version)
            elif (found := self.index.least_worth(place)) is not None:
                place, nbytes = found
                if self.remove(place[2]):
                    self.index.raise_floor(place[0])
                    self._on_evict(place[2], nbytes)
            else:
                raise self._no_room(size)

    def commit(
        self,
        staging: Staging,
        stored: Iterable[StoredFile],
        cost_s: float,
        derived: str | None = None,
    ) -> StoredAdapter:
        """Make a staged folder an entry; if its content is here already, that entry stays.

        ``derived`` names what was derived from the files and lies beside them.
        """
        stored = tuple(sorted(stored, key=lambda file: file.name))
        digest = files_digest(stored)
        # Looked at before it is locked alone: readers may hold it for as long as they like.
        if (lease := self.lease(digest)) is not None:
            with lease as present:
                return self._drop_equal(staging, present)
        with self._publishing(digest):
            if (faster := self.entry(digest)) is not None:
                return self._drop_equal(staging, faster)
            staging.clear(keep=[derived, *(file.name for file in stored)])
            entry = StoredAdapter(
                digest=digest,
                folder=self._folder(digest),
                files=stored,
                cost_s=cost_s,
                created_s=self._clock(),
            )
            self._publish(staging, entry)
        return entry

    def add_derived(self, staging: Staging, entry: StoredAdapter, name: str) -> None:
        """Publish what was derived from an entry's files; what is there already stays."""
        made = staging.folder / name
        with self._publishing(entry.digest):
            if entry.has_derived(name) or self.entry(entry.digest) is None:
                return
            self._on_step("sync derived")
            files.sync_files(made)
            # All of it anew: a process that was killed here counted what did not come.
            nbytes = self._row(entry, entry.folder).bytes + files.size_of(made)
            self.index.set_bytes(entry.digest, nbytes)
            self._on_step("publish derived")
            made.rename(entry.folder / name)
            files.sync_folder(entry.folder)

    @contextlib.contextmanager
    def _publishing(self, digest: str) -> Iterator[None]:
        """Keep others from publishing or removing an entry that is not there whole.

        Whoever still reads what was lost is not waited for: that may be for ever.
        """
        path = self._entry_lock(digest)
        with files.locked(self._lock(f"publish-{digest}")):
            # Readers share the lock; only one who removes the entry keeps it from being shared.
            lock = files.acquire(path, wait=False) or files.acquire(path, shared=True)
            assert lock is not None
            try:
                yield
            finally:
                lock.release()

    def _drop_equal(self, staging: Staging, present: StoredAdapter) -> StoredAdapter:
        self._on_step("drop equal content")
        # What was derived stays for now: the entry there may not have it.
        staging.clear_files()
        return present

    def _publish(self, staging: Staging, entry: StoredAdapter) -> None:
        self._on_step("write entry")
        facts = {
            "files": [asdict(file) for file in entry.files],
            "cost_s": entry.cost_s,
            "created_s": entry.created_s,
        }
        (staging.folder / _ENTRY_FILE).unlink(missing_ok=True)
        (staging.folder / _ENTRY_FILE).write_text(json.dumps(facts), encoding="utf-8")
        self._on_step("sync entry")
        files.sync_files(staging.folder)
        # What lies there is damaged, or it would have been found.
        files.discard(entry.folder, self.root / "trash", self._on_step)
        self._on_step("count entry")
        self.index.put(self._row(entry, staging.folder), staging.version)
        self._on_step("publish entry")
        staging.folder.rename(entry.folder)
        self._on_step("sync entries")
        files.sync_folder(entry.folder.parent)

    # --- putting right --------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove what processes that were killed left behind. Leaves running fetches alone."""
        with files.locked(self._lock("store")):
            for path in (self.root / "trash").iterdir():
                shutil.rmtree(path, ignore_errors=True)
            for name in _FORMER_FOLDERS:
                shutil.rmtree(self.root / name, ignore_errors=True)
            self._staging.sweep()
            self._sweep_entries()
            for path in (self.root / "locks").iterdir():
                if path.name != "store" and (lock := files.acquire(path, wait=False)):
                    lock.release()

    def _sweep_entries(self) -> None:
        """Make index and folders agree; files are looked at only where they do not."""
        there = {path.name for path in (self.root / "entries").iterdir()}
        counted = self.index.digests()
        for digest in counted ^ there:
            # It may have been published since the two lists were made.
            if (entry := self.entry(digest)) is None:
                self.remove(digest)
            else:
                self.index.put(self._row(entry, entry.folder))

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken; reads every byte of every entry."""
        import hashlib

        counted = self.index.sizes(self.index.digests())
        assert self.used_bytes() >= sum(counted.values()), "bytes were counted wrong"
        for path in (self.root / "entries").iterdir():
            entry = self.entry(path.name)
            assert entry is not None, f"{path.name} is visible and not whole"
            assert files_digest(entry.files) == entry.digest, f"{path.name} is misnamed"
            names = {file.name for file in entry.files} | {_ENTRY_FILE}
            there = {item.name for item in path.iterdir() if not item.is_dir()}
            assert there == names, f"{path.name}: stray files"
            for file in entry.files:
                content = hashlib.sha256((path / file.name).read_bytes()).hexdigest()
                assert content == file.sha256, f"{path.name}: {file.name} is damaged"
            least = self._row(entry, path).bytes
            assert counted.get(path.name, 0) >= least, f"{path.name} is not counted"

    def _rows(self) -> Iterator[IndexRow]:
        """What an index that is made anew says of the entries."""
        for entry in self.entries():
            yield self._row(entry, entry.folder)

    def _row(self, entry: StoredAdapter, folder: Path) -> IndexRow:
        derived = (path for path in folder.iterdir() if path.is_dir())
        nbytes = entry.size + sum(map(files.size_of, derived))
        return IndexRow(entry.digest, nbytes, entry.cost_s, entry.created_s)

    def _no_room(self, size: int) -> AdapterUnavailableError:
        return AdapterUnavailableError(
            Reason.STORE_FULL,
            f"the adapter store has no room for {size:,} bytes: it holds {self.used_bytes():,} of "
            f"{self.max_bytes:,}, and what is in use stays",
        )

    def _folder(self, digest: str) -> Path:
        return self.root / "entries" / digest

    def _entry_lock(self, digest: str) -> Path:
        return self._lock(f"entry-{digest}")

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / name

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


def _make_private(root: Path) -> None:
    """Make the folder for its owner alone: private adapters lie in it."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(root.stat().st_mode) & 0o007:
        # Another user's, or on a disk that cannot be written: that is said elsewhere.
        with contextlib.suppress(OSError):
            root.chmod(0o700)


def _is_whole(entry: StoredAdapter) -> bool:
    for file in entry.files:
        try:
            if (entry.folder / file.name).stat().st_size != file.size:
                return False
        except OSError:
            return False
    return True
