"""What a server knows of adapters beyond its own end: names, pins, and what was loaded by hand.

Of each the last that was done, and what took back others as well: others may not know of it yet. It
is known in memory, and kept in a small SQLite file. Each change is on disk before whoever asked for it
is answered, so that the end of a process, however it comes, takes nothing back. No token is in it: what
needs one is known by its name only, until it is given again. A file that is damaged is put aside, and
one that cannot be written costs what it would have kept, never a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_contract.adapters import AdapterRef
from lorax_router.service.adapters.aliases import Alias
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.managed import (
    STEP_S,
    ManagedChange,
    ManagedKind,
    ManagedRecord,
    Stamp,
    Taken,
    call_stamp,
)

logger = logging.getLogger(__name__)

_VERSION = 3
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS changes (
    kind TEXT, source TEXT, id TEXT, revision TEXT, tenant TEXT, at REAL, made_by TEXT,
    target_source TEXT, target_id TEXT, target_revision TEXT, is_private INTEGER,
    PRIMARY KEY (kind, source, id, revision, tenant));
PRAGMA user_version = {_VERSION};
"""
_FORGET = "DELETE FROM changes WHERE source = ? AND id = ? AND revision = ?"
_WRITE = "INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


# What makes a file one that cannot be used any more.
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class _UnknownVersionError(Exception):
    """Another release has written the file."""


@dataclass(frozen=True, slots=True)
class Pin:
    """An adapter that a tenant keeps on the shards; the empty one is the operator."""

    ref: AdapterRef
    tenant: str
    # Whether it took a token, which is not known any more.
    is_private: bool


@dataclass(frozen=True, slots=True)
class Remembered:
    """What was known when the server ended."""

    names: tuple[Alias, ...] = ()
    # Those of them whose adapters took a token.
    private_names: frozenset[str] = frozenset()
    pins: tuple[Pin, ...] = ()
    loads: tuple[AdapterRef, ...] = ()

    @classmethod
    def of(cls, changes: Iterable[ManagedChange]) -> Remembered:
        """Return what holds of all that was done, in its order."""
        changes = [*changes]
        named = [(each, each.target) for each in changes if each.kind is ManagedKind.NAME]
        return cls(
            tuple(
                Alias(name=each.ref.id, target=AdapterSelection(refs=(target,)), stamp=each.stamp)
                for each, target in named
                if target is not None
            ),
            frozenset(each.ref.id for each, _ in named if each.is_private),
            tuple(
                Pin(each.ref, each.tenant, each.is_private)
                for each in changes
                if each.kind is ManagedKind.PIN
            ),
            tuple(each.ref for each in changes if each.kind is ManagedKind.LOAD),
        )


class AdapterRegistry:
    """Owns the record and its file; used in one event loop.

    Args:
        path: the file; "": what is told is forgotten with the process.
    """

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._record: ManagedRecord | None = None
        # Whoever does something here alone.
        self._id = secrets.token_hex(4)
        self._stamped_at = 0.0
        # About what the file is behind.
        self._unsaved: set[AdapterRef] = set()
        self._saving = asyncio.Lock()

    # --- changes ------------------------------------------------------------------

    @property
    def record(self) -> ManagedRecord:
        """What is known; read from the file when it is asked for first."""
        if self._record is None:
            self._record = ManagedRecord()
            self._record.take(self._read_all())
        return self._record

    def clock(self) -> float:
        """Return a Unix time for what is done now: later than all that is known here."""
        return max(time.time(), self.record.latest + STEP_S)

    def stamp(self) -> Stamp:
        """Return the stamp of the call that is carried out: the one that it came with, or a new one."""
        if (given := call_stamp.get()) is not None:
            return given
        self._stamped_at = max(self.clock(), self._stamped_at + STEP_S)
        return Stamp(self._stamped_at, self._id)

    def take(self, changes: Iterable[ManagedChange]) -> Taken:
        """Take over what was done, here or elsewhere; ``save`` has it on disk."""
        taken = self.record.take(changes)
        self._unsaved |= taken.refs
        return taken

    async def put(self, *changes: ManagedChange) -> None:
        """Remember what is done here; it is on disk when this returns."""
        self.take(changes)
        await self.save()

    async def save(self) -> None:
        """Return when all that was taken is on disk; what cannot be written is told in the log."""
        if not self._path:
            return
        async with self._saving:
            refs, self._unsaved = self._unsaved, set()
            # The record is this loop's alone.
            known = {ref: [_row(each) for each in self.record.about(ref)] for ref in refs}
            if not await asyncio.to_thread(self._write, known):
                self._unsaved |= refs

    def read(self) -> Remembered:
        """Return what holds of all that is known."""
        return Remembered.of(self.record.all())

    # --- the file -----------------------------------------------------------------

    def _read_all(self) -> list[ManagedChange]:
        if not self._path or not Path(self._path).exists():
            return []
        try:
            with self._lock:
                rows = self._opened().execute("SELECT * FROM changes").fetchall()
            return [_change_of(row) for row in rows]
        except _UnknownVersionError as error:
            self._put_aside(error)
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorcode", None) in _DAMAGED:
                self._put_aside(error)
            else:
                # Locked, perhaps, or not readable now: it is left as it is.
                logger.error(
                    "%s cannot be read now, and nothing of it is known: %s", self._path, error
                )
        return []

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _write(self, known: Mapping[AdapterRef, Sequence[tuple[Any, ...]]]) -> bool:
        """Have the file say of adapters what is known of them; returns whether that could be."""
        try:
            with self._lock, self._opened() as db:
                for ref, rows in known.items():
                    db.execute(_FORGET, _key(ref))
                    db.executemany(_WRITE, rows)
            return True
        except (sqlite3.Error, OSError, _UnknownVersionError) as error:
            logger.warning(
                "%s cannot be written (%s): what was named, pinned or loaded now is forgotten when "
                "the server ends", self._path, error,
            )  # fmt: skip
            return False

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            _make_private(Path(self._path))
            db = sqlite3.connect(self._path, check_same_thread=False)
            try:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, _VERSION):
                    raise _UnknownVersionError(f"it is of version {version}, not {_VERSION}")
                if not version:
                    db.executescript(_SCHEMA)
            except BaseException:
                db.close()
                raise
            self._connection = db
        return self._connection

    def _put_aside(self, error: Exception) -> None:
        self.close()
        aside = f"{self._path}.damaged"
        logger.error(
            "%s cannot be read (%s): names, pins and adapters that were loaded by hand are not known "
            "any more; the file is %s now", self._path, error, aside,
        )  # fmt: skip
        try:
            Path(self._path).replace(aside)
            # Of the file that is aside now.
            Path(f"{self._path}-journal").unlink(missing_ok=True)
        except OSError as failed:
            logger.warning("%s cannot be put aside: %s", self._path, failed)


def _make_private(path: Path) -> None:
    """Let this user alone read the file: private adapters are named in it.

    What SQLite writes beside it gets the same mode. Raises OSError if it has no folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Another user's, or on a disk that cannot be written: SQLite says what there is to say.
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)


def _row(change: ManagedChange) -> tuple[Any, ...]:
    target = (None, None, None) if change.target is None else _key(change.target)
    return (
        change.kind.value, *_key(change.ref), change.tenant, *change.stamp, *target,
        change.is_private,
    )  # fmt: skip


def _change_of(row: Sequence[Any]) -> ManagedChange:
    kind, *key, tenant, at, by, source, id_, revision, is_private = row
    return ManagedChange(
        kind=ManagedKind(kind), ref=_ref(*key), stamp=Stamp(at, by), tenant=tenant,
        target=None if source is None else _ref(source, id_, revision), is_private=bool(is_private),
    )  # fmt: skip


def _key(ref: AdapterRef) -> tuple[str, str, str]:
    return ref.source, ref.id, ref.revision or ""


def _ref(source: str, id_: str, revision: str) -> AdapterRef:
    return AdapterRef.of(source, id_, revision or None)
