"""What a stored adapter is read by, elsewhere than in its store: a list of files, and pieces."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorax_contract.adapters import AdapterPart, AdapterUnavailableError, Reason
from lorax_shard.store.store import AdapterStore, Lease, StoredAdapter

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFile:
    """A file of a stored adapter, or of its normal form."""

    name: str
    size: int
    sha256: str
    is_derived: bool = False


class EntryReader(Protocol):
    """Where a stored adapter is read from; both raise AdapterUnavailableError."""

    def files(self, part: AdapterPart) -> list[EntryFile]:
        """Return all its files, those of the normal form last."""
        ...

    def piece(self, part: AdapterPart, file: int, offset: int) -> bytes:
        """Return what follows an offset of the file of this number, ``PIECE_BYTES`` at most."""
        ...


class StoredPieces:
    """Reads what lies in this host's store; any thread may.

    Only digests name what is read, and numbers its files: no caller gives a path.
    """

    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    def files(self, part: AdapterPart) -> list[EntryFile]:
        """Return the files of an adapter; those of its normal form are read for their digests."""
        with self._lease(part) as entry:
            own = [
                EntryFile(name=each.name, size=each.size, sha256=each.sha256)
                for each in entry.files
            ]
            return own + [_derived_file(path) for path in _derived_paths(entry, part)]

    def piece(self, part: AdapterPart, file: int, offset: int) -> bytes:
        """Return a piece of a file; AdapterUnavailableError where there is no such file."""
        with self._lease(part) as entry:
            paths = [entry.folder / each.name for each in entry.files]
            paths += _derived_paths(entry, part)
            if file >= len(paths):
                text = f"the stored adapter has {len(paths)} files, none of the number {file}"
                raise AdapterUnavailableError(Reason.REFUSED, text)
            with paths[file].open("rb") as opened:
                opened.seek(offset)
                return opened.read(PIECE_BYTES)

    def _lease(self, part: AdapterPart) -> Lease:
        lease = held_whole(self._store, part)
        if lease is None:
            text = "the adapter's files left rank 0's disk; it must be fetched again"
            raise AdapterUnavailableError(Reason.EVICTED, text)
        return lease


def held_whole(store: AdapterStore, part: AdapterPart) -> Lease | None:
    """Keep an adapter on the disk with its normal form; None: it is not there, or not all of it."""
    lease = store.lease(part.store_digest)
    if lease is None:
        return None
    if _is_digest(part.content_digest) and lease.entry.has_derived(part.content_digest):
        return lease
    lease.release()
    return None


def _is_digest(name: str) -> bool:
    """Return whether a name is none that leads elsewhere as a path."""
    return name.isascii() and name.isalnum()


def _derived_paths(entry: StoredAdapter, part: AdapterPart) -> list[Path]:
    return sorted((entry.folder / part.content_digest).iterdir())


def _derived_file(path: Path) -> EntryFile:
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return EntryFile(name=path.name, size=path.stat().st_size, sha256=sha256, is_derived=True)
