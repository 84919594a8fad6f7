"""What a server knows of adapters beyond its own end: names, pins, and what was loaded by hand.

Of each the last that was done, and what was taken back as well: others may not know of it yet. A small
SQLite file. Each change is on disk before whoever asked for it is answered, so that the end of
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorax_contract.adapters import ALIAS_SOURCE, AdapterRef
from lorax_router.service.adapters.aliases import Alias
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.managed import ManagedChange, ManagedKind

logger = logging.getLogger(__name__)

# Adapters that were loaded by hand and are neither pinned nor named: the latest are kept.
_MAX_LOADS = 256
# The same of what was taken back, and of what was asked for anew.
_MAX_PAST = 4096
# Seconds by which what is done here is later than what it changes, whatever clocks say.
_STEP_S = 0.001
_VERSION = 2
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS changes (
    kind TEXT, source TEXT, id TEXT, revision TEXT, tenant TEXT, at REAL, holds INTEGER,
    target_source TEXT, target_id TEXT, target_revision TEXT, is_private INTEGER,
    PRIMARY KEY (kind, source, id, revision, tenant));
PRAGMA user_version = {_VERSION};
"""
_FIND = """
SELECT * FROM changes WHERE kind = ? AND source = ? AND id = ? AND revision = ? AND tenant = ?"""
_LATEST = "SELECT MAX(at) FROM changes WHERE source = ? AND id = ? AND revision = ?"
_WRITE = "REPLACE INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PINS = """
SELECT * FROM changes
WHERE kind = 'pin' AND holds AND source = ? AND id = ? AND revision = ? AND at <= ?"""
_FORGET_LOADS = """
DELETE FROM changes WHERE rowid IN (
    SELECT rowid FROM changes WHERE kind = 'load' AND holds ORDER BY at DESC LIMIT -1 OFFSET ?)"""
_FORGET_PAST = """
DELETE FROM changes WHERE rowid IN (
    SELECT rowid FROM changes WHERE kind = 'reload' OR NOT holds ORDER BY at DESC LIMIT -1 OFFSET ?)"""


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
        holding = [each for each in changes if each.holds]
        named = [(each, each.target) for each in holding if each.kind is ManagedKind.NAME]
        return cls(
            tuple(
                Alias(name=each.ref.id, target=AdapterSelection(refs=(target,)), created_at=each.at)
                for each, target in named
                if target is not None
            ),
            frozenset(each.ref.id for each, _ in named if each.is_private),
            tuple(
                Pin(each.ref, each.tenant, each.is_private)
                for each in holding
                if each.kind is ManagedKind.PIN
            ),
            tuple(each.ref for each in holding if each.kind is ManagedKind.LOAD),
        )


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
        await self._put(
            ManagedChange(
                kind=ManagedKind.NAME, ref=alias.ref, at=alias.created_at, target=target.refs[0],
                is_private=target.token is not None,
            )
        )  # fmt: skip

    async def pinned(
        self, ref: AdapterRef, tenant: str, *, is_private: bool, at: float | None = None
    ) -> None:
        """A tenant keeps an adapter on the shards, since a Unix time; None: from now on."""
        await self._put(_done(ManagedKind.PIN, ref, at, tenant=tenant, is_private=is_private))

    async def unpinned(self, ref: AdapterRef, tenant: str | None) -> None:
        """A tenant does not keep it any more; None: nobody does."""
        tenants = {tenant}
        if tenant is None:
            remembered = await asyncio.to_thread(self.read)
            tenants = {"", *(pin.tenant for pin in remembered.pins if pin.ref == ref)}
        kind = ManagedKind.PIN
        await self._put(*(_done(kind, ref, tenant=each or "", holds=False) for each in tenants))

    async def loaded(self, ref: AdapterRef, at: float | None = None) -> None:
        """An adapter that everybody may use was loaded by hand."""
        await self._put(_done(ManagedKind.LOAD, ref, at))

    async def reloaded(self, ref: AdapterRef, at: float | None = None) -> None:
        """An adapter's source is asked anew by hand."""
        await self._put(_done(ManagedKind.RELOAD, ref, at))

    async def unloaded(self, ref: AdapterRef) -> None:
        """An adapter is unloaded by hand, and its name, if it is one, taken back."""
        changes = [_done(ManagedKind.LOAD, ref, holds=False)]
        if ref.source == ALIAS_SOURCE:
            changes.append(_done(ManagedKind.NAME, ref, holds=False))
        await self._put(*changes)

    async def _put(self, *changes: ManagedChange) -> None:
        """Write what is done here: it is later than all that is known of the adapter."""

        def work(db: sqlite3.Connection) -> None:
            for each in changes:
                (latest,) = db.execute(_LATEST, _key(each.ref)).fetchone()
                at = each.at if latest is None else max(each.at, latest + _STEP_S)
                for one in _with_pins(db, replace(each, at=at)):
                    _write(db, one)
            _bound(db)

        await self._change(work)

    async def take(self, changes: Sequence[ManagedChange]) -> Sequence[ManagedChange]:
        """Write what was done elsewhere; returns what is to be done for it here.

        That is what is later than what is known; where nothing can be written, all of it.
        """
        news: list[ManagedChange] = []

        def work(db: sqlite3.Connection) -> None:
            for each in changes:
                if _is_known(db, each):
                    continue
                wanted = not _is_unknown_pin(db, each)
                for one in _with_pins(db, each):
                    _write(db, one)
                    news.extend([one] if wanted else [])
            _bound(db)
            # Neither what went with the same message nor what is too long ago to be remembered.
            news[:] = [each for each in news if _is_last(db, each)]

        return news if await self._change(work) else changes

    async def changes(self) -> list[ManagedChange]:
        """Return the last change of everything, the earliest first."""
        return await asyncio.to_thread(self._read_all)

    async def holds(self, change: ManagedChange) -> bool:
        """Whether what a change is about holds now, as far as that can be read."""
        found: list[ManagedChange | None] = []
        can_read = await self._change(lambda db: found.append(_last(db, change)))
        return not can_read or (found[0] is not None and found[0].holds)

    # --- the file -----------------------------------------------------------------

    def read(self) -> Remembered:
        """Return what was known when the server ended."""
        return Remembered.of(self._read_all())

    def _read_all(self) -> list[ManagedChange]:
        if self._path and not Path(self._path).exists():
            return []
        try:
            with self._lock:
                rows = self._opened().execute("SELECT * FROM changes ORDER BY at").fetchall()
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

    async def _change(self, work: Callable[[sqlite3.Connection], object]) -> bool:
        return await asyncio.to_thread(self._changed, work)

    def _changed(self, work: Callable[[sqlite3.Connection], object]) -> bool:
        """Change the file; returns whether that could be."""
        try:
            with self._lock, self._opened() as db:
                work(db)
            return True
        except (sqlite3.Error, OSError, _UnknownVersionError) as error:
            logger.warning(
                "%s cannot be written (%s): what was named, pinned or loaded now is forgotten when "
                "the server ends", self._path, error,
            )  # fmt: skip
            return False

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


def _done(
    kind: ManagedKind, ref: AdapterRef, at: float | None = None, *, holds: bool = True,
    tenant: str = "", is_private: bool = False,
) -> ManagedChange:  # fmt: skip
    """Return what is done at a Unix time; None: now."""
    at = time.time() if at is None else at
    return ManagedChange(
        kind=kind, ref=ref, at=at, holds=holds, tenant=tenant, is_private=is_private
    )


def _last(db: sqlite3.Connection, change: ManagedChange) -> ManagedChange | None:
    """Return what is known of what a change is about."""
    key = (change.kind.value, *_key(change.ref), change.tenant)
    row = db.execute(_FIND, key).fetchone()
    return None if row is None else _change_of(row)


def _write(db: sqlite3.Connection, change: ManagedChange) -> None:
    key, target = _key(change.ref), change.target
    db.execute(
        _WRITE,
        (
            change.kind.value, *key, change.tenant, change.at, change.holds,
            *((None, None, None) if target is None else _key(target)), change.is_private,
        ),
    )  # fmt: skip


def _with_pins(db: sqlite3.Connection, change: ManagedChange) -> list[ManagedChange]:
    """Return a change and what goes with it: what is unloaded nobody keeps."""
    if change.kind is not ManagedKind.LOAD or change.holds:
        return [change]
    pins = db.execute(_PINS, (*_key(change.ref), change.at)).fetchall()
    gone = [replace(_change_of(row), at=change.at, holds=False) for row in pins]
    return [change, *gone]


def _is_known(db: sqlite3.Connection, change: ManagedChange) -> bool:
    """Whether something later is known, or the same."""
    known = [_last(db, change)]
    if change.kind is ManagedKind.PIN and change.holds:
        unloaded = _last(db, replace(change, kind=ManagedKind.LOAD, tenant=""))
        known += [] if unloaded is None or unloaded.holds else [unloaded]
    return any(each is not None and each.at >= change.at for each in known)


def _is_last(db: sqlite3.Connection, change: ManagedChange) -> bool:
    last = _last(db, change)
    return last is not None and (last.at, last.holds) == (change.at, change.holds)


def _is_unknown_pin(db: sqlite3.Connection, change: ManagedChange) -> bool:
    """Whether a pin is taken back that nobody made by hand here: what there is, the options want."""
    if change.kind is not ManagedKind.PIN or change.holds:
        return False
    former = _last(db, change)
    return former is None or not former.holds


def _bound(db: sqlite3.Connection) -> None:
    db.execute(_FORGET_LOADS, (_MAX_LOADS,))
    db.execute(_FORGET_PAST, (_MAX_PAST,))


def _change_of(row: Sequence[Any]) -> ManagedChange:
    kind, *key, tenant, at, holds, source, id_, revision, is_private = row
    return ManagedChange(
        kind=ManagedKind(kind), ref=_ref(*key), at=at, holds=bool(holds), tenant=tenant,
        target=None if source is None else _ref(source, id_, revision), is_private=bool(is_private),
    )  # fmt: skip


def _key(ref: AdapterRef) -> tuple[str, str, str]:
    return ref.source, ref.id, ref.revision or ""


def _ref(source: str, id_: str, revision: str) -> AdapterRef:
    return AdapterRef.of(source, id_, revision or None)
