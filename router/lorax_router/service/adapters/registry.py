"""What a server knows of adapters beyond its own end: names, pins, and what was loaded by hand.

A small SQLite file. Each change is on disk before whoever asked for it is answered, so that the end of
a process, however it comes, takes nothing back. No token is in it: what needs one is known by its name
only, until it is given again. A file that is damaged is put aside, and one that cannot be written costs
what it would have kept, never a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorax_contract.adapters import AdapterRef
from lorax_router.service.adapters.aliases import Alias
from lorax_router.service.adapters.catalog import AdapterSelection

logger = logging.getLogger(__name__)

# Adapters that were loaded by hand and are neither pinned nor named: the latest are kept.
_MAX_LOADS = 256
_VERSION = 1
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS names (
    name TEXT PRIMARY KEY, source TEXT, id TEXT, revision TEXT, is_private INTEGER, created_at REAL);
CREATE TABLE IF NOT EXISTS pins (
    source TEXT, id TEXT, revision TEXT, tenant TEXT, is_private INTEGER,
    PRIMARY KEY (source, id, revision, tenant));
CREATE TABLE IF NOT EXISTS loads (
    source TEXT, id TEXT, revision TEXT, loaded_at REAL, PRIMARY KEY (source, id, revision));
PRAGMA user_version = {_VERSION};
"""


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


class AdapterRegistry:
    """Owns the file; AdapterManager tells it what changes.

    Args:
        path: the file; "": what is told is forgotten with the process.
    """

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    # --- changes ------------------------------------------------------------------

    async def named(self, alias: Alias) -> None:
        """A name stands for an adapter from now on."""
        target = alias.target
        values = (alias.name, *_key(target.refs[0]), target.token is not None, alias.created_at)
        await self._change(
            lambda db: db.execute("REPLACE INTO names VALUES (?, ?, ?, ?, ?, ?)", values)
        )

    async def pinned(self, ref: AdapterRef, tenant: str, *, is_private: bool) -> None:
        """A tenant keeps an adapter on the shards from now on."""
        values = (*_key(ref), tenant, is_private)
        await self._change(
            lambda db: db.execute("REPLACE INTO pins VALUES (?, ?, ?, ?, ?)", values)
        )

    async def unpinned(self, ref: AdapterRef, tenant: str | None) -> None:
        """A tenant does not keep it any more; None: nobody does."""
        values = (*_key(ref), tenant, tenant)
        await self._change(
            lambda db: db.execute(
                "DELETE FROM pins WHERE source = ? AND id = ? AND revision = ? "
                "AND (? IS NULL OR tenant = ?)",
                values,
            )
        )

    async def loaded(self, ref: AdapterRef) -> None:
        """An adapter that everybody may use was loaded by hand."""

        def change(db: sqlite3.Connection) -> None:
            db.execute("REPLACE INTO loads VALUES (?, ?, ?, ?)", (*_key(ref), time.time()))
            db.execute(
                "DELETE FROM loads WHERE rowid NOT IN "
                "(SELECT rowid FROM loads ORDER BY loaded_at DESC LIMIT ?)",
                (_MAX_LOADS,),
            )

        await self._change(change)

    async def unloaded(self, ref: AdapterRef, alias: Alias | None = None) -> None:
        """An adapter was unloaded by hand, and its name, if it is one, taken back."""
        key = _key(ref)

        def change(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM loads WHERE source = ? AND id = ? AND revision = ?", key)
            db.execute("DELETE FROM pins WHERE source = ? AND id = ? AND revision = ?", key)
            if alias is not None:
                db.execute("DELETE FROM names WHERE name = ?", (alias.name,))

        await self._change(change)

    # --- the file -----------------------------------------------------------------

    def read(self) -> Remembered:
        """Return what was known when the server ended."""
        if self._path and not Path(self._path).exists():
            return Remembered()
        try:
            return self._read()
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
        return Remembered()

    def _read(self) -> Remembered:
        with self._lock:
            db = self._opened()
            names = db.execute(
                "SELECT name, source, id, revision, created_at, is_private FROM names "
                "ORDER BY created_at"
            ).fetchall()
            pins = db.execute("SELECT * FROM pins").fetchall()
            loads = db.execute("SELECT * FROM loads ORDER BY loaded_at").fetchall()
        return Remembered(
            tuple(_alias(*row[:5]) for row in names),
            frozenset(row[0] for row in names if row[5]),
            tuple(Pin(_ref(*row[:3]), row[3], bool(row[4])) for row in pins),
            tuple(_ref(*row[:3]) for row in loads),
        )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    async def _change(self, work: Callable[[sqlite3.Connection], object]) -> None:
        await asyncio.to_thread(self._changed, work)

    def _changed(self, work: Callable[[sqlite3.Connection], object]) -> None:
        try:
            with self._lock, self._opened() as db:
                work(db)
        except (sqlite3.Error, OSError, _UnknownVersionError) as error:
            logger.warning(
                "%s cannot be written (%s): what was named, pinned or loaded now is forgotten when "
                "the server ends", self._path, error,
            )  # fmt: skip

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._path:
                _make_private(Path(self._path))
            db = sqlite3.connect(self._path or ":memory:", check_same_thread=False)
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


def _key(ref: AdapterRef) -> tuple[str, str, str]:
    return ref.source, ref.id, ref.revision or ""


def _ref(source: str, id_: str, revision: str) -> AdapterRef:
    return AdapterRef.of(source, id_, revision or None)


def _alias(name: str, source: str, id_: str, revision: str, created_at: float) -> Alias:
    target = AdapterSelection(refs=(_ref(source, id_, revision),))
    return Alias(name=name, target=target, created_at=created_at)
