"""What the store knows beside the entries' files: sizes, uses, names, versions, reservations.

Nothing here lists all entries: each question and each change costs the same with ten
entries and with a hundred thousand. A record belongs to an entry and goes with its row.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from lorax_contract.adapters import Access, AdapterRef, key_of
from lorax_contract.eviction import worth
from lorax_shard.store.database import Database

_VERSION = 1
_COUNTING = """
    CREATE TRIGGER {table}_{event} AFTER {event} ON {table}
    BEGIN UPDATE totals SET bytes = bytes + {change}; END"""
_SCHEMA = (
    """
    CREATE TABLE entries (
        digest TEXT PRIMARY KEY, bytes INTEGER NOT NULL, cost_s REAL NOT NULL,
        uses REAL NOT NULL, used_s REAL NOT NULL, worth REAL NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX entries_by_worth ON entries (worth, used_s, digest)",
    """
    CREATE TABLE names (
        key TEXT PRIMARY KEY, record TEXT NOT NULL,
        digest TEXT NOT NULL REFERENCES entries ON DELETE CASCADE
    )""",
    "CREATE INDEX names_by_digest ON names (digest)",
    """
    CREATE TABLE versions (
        key TEXT PRIMARY KEY, digest TEXT NOT NULL REFERENCES entries ON DELETE CASCADE
    ) WITHOUT ROWID""",
    "CREATE INDEX versions_by_digest ON versions (digest)",
    """
    CREATE TABLE verdicts (
        digest TEXT NOT NULL REFERENCES entries ON DELETE CASCADE,
        verifier TEXT NOT NULL, facts TEXT NOT NULL, PRIMARY KEY (digest, verifier)
    )""",
    # Fetches under way or broken off, and the bytes kept free for each.
    "CREATE TABLE staging (version TEXT PRIMARY KEY, bytes INTEGER NOT NULL, since_s REAL NOT NULL)",
    "CREATE INDEX staging_by_age ON staging (since_s)",
    # One row: the bytes of all entries and reservations, and what eviction remembers.
    "CREATE TABLE totals (bytes INTEGER NOT NULL, floor REAL NOT NULL)",
    "INSERT INTO totals VALUES (0, 0)",
    *(
        _COUNTING.format(table=table, event=event, change=change)
        for table in ("entries", "staging")
        for event, change in (
            ("INSERT", "NEW.bytes"),
            ("DELETE", "-OLD.bytes"),
            ("UPDATE", "NEW.bytes - OLD.bytes"),
        )
    ),
)
# Uses count half after a day, so that last week's favourite does not stay for ever.
_HALF_LIFE_S = 86_400.0
# What reading it from this disk's neighbour would take; keeps a cost of nothing from being one.
_LEAST_COST_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRecord:
    """What a name led to when its source was last asked."""

    # Which hub, which endpoint of S3.
    realm: str
    ref: AdapterRef
    version: str
    digest: str
    access: Access
    # Seconds since the epoch.
    checked_at: float

    @property
    def key(self) -> str:
        """A short name for what was asked."""
        return _name_key(self.realm, self.ref)


@dataclass(frozen=True, slots=True)
class IndexRow:
    """An entry as it is counted."""

    digest: str
    bytes: int
    # Seconds that resolving and fetching it took.
    cost_s: float
    # Since the epoch: when it was last wanted.
    used_s: float


# Where the walk over entries in the order of their worth has come to.
Place = tuple[float, float, str]
BEFORE_ALL: Place = (-1.0, 0.0, "")


class StoreIndex:
    """Rows about the entries of one store.

    Args:
        path: the file.
        lock: see Database.
        entries: lists the entries that are there, for an index that is made anew.
    """

    def __init__(self, path: Path, lock: Path, entries: Callable[[], Iterable[IndexRow]]) -> None:
        def fill(db: sqlite3.Connection) -> None:
            for row in entries():
                _put(db, row)

        self._db = Database(path, _VERSION, _SCHEMA, fill, lock)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._db.close()

    # --- entries --------------------------------------------------------------------

    def put(self, row: IndexRow, version: str | None = None) -> None:
        """Count an entry, in place of the reservation of ``version``."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM staging WHERE version = ?", (version,))
            _put(db, row)

        self._db.change(work)

    def put_all(self, rows: Iterable[IndexRow]) -> None:
        """Count many entries."""

        def work(db: sqlite3.Connection) -> None:
            for row in rows:
                _put(db, row)

        self._db.change(work)

    def set_bytes(self, digest: str, nbytes: int) -> None:
        """Count what an entry takes from now on."""
        self._db.change(
            lambda db: db.execute("UPDATE entries SET bytes = ? WHERE digest = ?", (nbytes, digest))
        )

    def drop(self, digest: str) -> None:
        """Forget an entry and all that is known of it."""
        self._db.change(lambda db: db.execute("DELETE FROM entries WHERE digest = ?", (digest,)))

    def count_use(self, digest: str, now: float) -> None:
        """Note that an entry is wanted now, where the disk has room for that."""
        self._db.note(lambda db: _count_use(db, digest, now))

    def sizes(self, digests: Iterable[str]) -> dict[str, int]:
        """Return the bytes of those of ``digests`` that are there."""
        wanted = json.dumps(list(digests))
        return dict(
            self._db.ask(
                lambda db: db.execute(
                    "SELECT digest, bytes FROM entries "
                    "WHERE digest IN (SELECT value FROM json_each(?))",
                    (wanted,),
                ).fetchall()
            )
        )

    def digests(self) -> set[str]:
        """Return the digests of all entries; for a store's start."""
        rows = self._db.ask(lambda db: db.execute("SELECT digest FROM entries").fetchall())
        return {digest for (digest,) in rows}

    def used_bytes(self) -> int:
        """Return the bytes of all entries and of what is reserved."""
        found = self._db.ask(lambda db: db.execute("SELECT bytes FROM totals").fetchone())
        return int(found[0])

    def least_worth(self, after: Place) -> tuple[Place, int] | None:
        """Return the entry that gives way next, behind a place, and its bytes."""
        row = self._db.ask(
            lambda db: db.execute(
                "SELECT worth, used_s, digest, bytes FROM entries "
                "WHERE (worth, used_s, digest) > (?, ?, ?) "
                "ORDER BY worth, used_s, digest LIMIT 1",
                after,
            ).fetchone()
        )
        return None if row is None else (row[:3], row[3])

    def raise_floor(self, least: float) -> None:
        """Remember the worth of what gave way."""
        self._db.change(lambda db: db.execute("UPDATE totals SET floor = MAX(floor, ?)", (least,)))

    # --- reservations -----------------------------------------------------------------

    def reserve(self, version: str, size: int, most: int, now: float) -> bool:
        """Keep ``size`` bytes for a fetch; False: all together would be more than ``most``."""

        def work(db: sqlite3.Connection) -> bool:
            (used,) = db.execute("SELECT bytes FROM totals").fetchone()
            own = db.execute("SELECT bytes FROM staging WHERE version = ?", (version,)).fetchone()
            if used - (own[0] if own else 0) + size > most:
                return False
            _reserve(db, version, size, now)
            return True

        return self._db.change(work)

    def set_reserved(self, version: str, size: int, now: float) -> None:
        """Count what a broken-off fetch left, whatever else is there."""
        self._db.change(lambda db: _reserve(db, version, size, now))

    def release(self, version: str) -> None:
        """Keep nothing for a fetch any more."""
        self._db.change(lambda db: db.execute("DELETE FROM staging WHERE version = ?", (version,)))

    def reserved(self) -> dict[str, float]:
        """Return when each fetch under way or broken off reserved last, the oldest first."""
        return dict(
            self._db.ask(
                lambda db: db.execute(
                    "SELECT version, since_s FROM staging ORDER BY since_s"
                ).fetchall()
            )
        )

    # --- names, versions, verdicts -----------------------------------------------------------

    def name(self, realm: str, ref: AdapterRef) -> NameRecord | None:
        """Return what ``ref`` led to, or None if it is not known."""
        row = self._db.ask(
            lambda db: db.execute(
                "SELECT record FROM names WHERE key = ?", (_name_key(realm, ref),)
            ).fetchone()
        )
        if row is None:
            return None
        document = json.loads(row[0])
        return NameRecord(**{**document, "ref": AdapterRef(**document["ref"])})

    def forget_name(self, realm: str, ref: AdapterRef) -> None:
        """Drop what a name led to."""
        key = _name_key(realm, ref)
        self._db.change(lambda db: db.execute("DELETE FROM names WHERE key = ?", (key,)))

    def digest_of_version(self, version: str) -> str | None:
        """Return the digest of a concrete version's content, if it was fetched before."""
        row = self._db.ask(
            lambda db: db.execute(
                "SELECT digest FROM versions WHERE key = ?", (version,)
            ).fetchone()
        )
        return None if row is None else row[0]

    def wanted(self, name: NameRecord, version: str | None) -> None:
        """Note that a name was asked for and what it leads to.

        Args:
            name: what its source says.
            version: the version's key, if later looks at it may trust its bytes.

        An entry that was evicted meanwhile gets no records, nor does any on a disk that is full.
        """
        record = json.dumps(asdict(name))

        def work(db: sqlite3.Connection) -> None:
            if not _count_use(db, name.digest, name.checked_at):
                return
            if version is not None:
                db.execute("REPLACE INTO versions VALUES (?, ?)", (version, name.digest))
            db.execute("REPLACE INTO names VALUES (?, ?, ?)", (name.key, record, name.digest))

        self._db.note(work)

    def verdict(self, digest: str, verifier: str) -> dict[str, Any] | None:
        """Return what a verifier found out about an entry, if it was asked before."""
        row = self._db.ask(
            lambda db: db.execute(
                "SELECT facts FROM verdicts WHERE digest = ? AND verifier = ?", (digest, verifier)
            ).fetchone()
        )
        return None if row is None else cast(dict[str, Any], json.loads(row[0]))

    def set_verdict(self, digest: str, verifier: str, facts: Mapping[str, Any]) -> None:
        """Remember what a verifier found out about an entry, if it is still there."""
        values = (digest, verifier, json.dumps(facts), digest)
        self._db.change(
            lambda db: db.execute(
                "REPLACE INTO verdicts SELECT ?, ?, ? "
                "WHERE EXISTS (SELECT 1 FROM entries WHERE digest = ?)",
                values,
            )
        )


def _put(db: sqlite3.Connection, row: IndexRow) -> None:
    # One that is replaced keeps what is known of it.
    db.execute(
        "INSERT INTO entries VALUES (?, ?, ?, 1, ?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET bytes = excluded.bytes",
        (
            row.digest,
            row.bytes,
            row.cost_s,
            row.used_s,
            worth(_floor(db), 1.0, max(row.cost_s, _LEAST_COST_S), row.bytes),
        ),
    )


def _count_use(db: sqlite3.Connection, digest: str, now: float) -> bool:
    """Count a use; False: there is no such entry."""
    row = db.execute(
        "SELECT bytes, cost_s, uses, used_s FROM entries WHERE digest = ?", (digest,)
    ).fetchone()
    if row is None:
        return False
    nbytes, cost_s, before, used_s = row
    uses = 1.0 + before * math.exp2(-max(now - used_s, 0.0) / _HALF_LIFE_S)
    value = worth(_floor(db), uses, max(cost_s, _LEAST_COST_S), nbytes)
    db.execute(
        "UPDATE entries SET uses = ?, used_s = ?, worth = ? WHERE digest = ?",
        (uses, now, value, digest),
    )
    return True


def _floor(db: sqlite3.Connection) -> float:
    return float(db.execute("SELECT floor FROM totals").fetchone()[0])


def _reserve(db: sqlite3.Connection, version: str, size: int, now: float) -> None:
    # REPLACE would not run the trigger of the row that it deletes.
    db.execute(
        "INSERT INTO staging VALUES (?, ?, ?) ON CONFLICT (version) "
        "DO UPDATE SET bytes = excluded.bytes, since_s = excluded.since_s",
        (version, size, now),
    )


def _name_key(realm: str, ref: AdapterRef) -> str:
    return key_of(realm, ref.source, ref.id, ref.revision)
