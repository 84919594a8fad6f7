"""The store's SQLite file: shared by processes and threads, made anew when it is damaged."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_shard.files import locked

T = TypeVar("T")

logger = logging.getLogger(__name__)

# A change takes well under a millisecond; whoever waits this long waits for a stopped process.
_BUSY_S = 10.0
# SQLITE_ERROR: a table is missing. The statements themselves are right.
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
_UNWRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
# What SQLite keeps beside the file.
_COMPANIONS = ("", "-wal", "-shm")


class Database:
    """Changes of and questions to one SQLite file, which holds what can be made again.

    Args:
        path: the file.
        version: the number of the schema; a file with another one is replaced.
        schema: statements that make the tables.
        fill: called in the transaction that makes the tables, to write what is known.
        lock: a file that is locked while the database is made.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        schema: Sequence[str],
        fill: Callable[[sqlite3.Connection], None],
        lock: Path,
    ) -> None:
        self._path = path
        self._version = version
        self._schema = schema
        self._fill = fill
        self._file_lock = lock
        # One connection serves all threads, one after another.
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0

    def change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what ``work`` returns; others see all that it changes or nothing of it."""
        return self._done(lambda connection: _in_transaction(connection, work))

    def note(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Change what may be missing: nothing is, where the disk has no room or is read only.

        What is on a full disk already is served all the same.
        """
        try:
            self.change(work)
        except AdapterUnavailableError as error:
            if error.reason is not Reason.STORE_FULL:
                raise
            logger.warning("%s: who uses which adapter is not noted", error.public)

    def ask(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what ``work`` returns, which changes nothing."""
        return self._done(work)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            self._close()

    def _done(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do ``work``, once more on a new file if this one is damaged."""
        with self._lock, _in_words(self._path):
            try:
                return work(self._open())
            except sqlite3.DatabaseError as error:
                # Another process may have taken it away just now.
                if self._path.exists() and not _is_damage(error):
                    raise
                self._replace()
                return work(self._open())

    def _open(self) -> sqlite3.Connection:
        """Return the connection to the file that is there now: others may have replaced it."""
        if self._connection is None or self._inode != self._inode_at_path():
            self._close()
            self._inode = self._inode_at_path()
            self._connection = self._connected()
            self._inode = self._inode_at_path()
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> sqlite3.Connection:
        if not self._path.exists():
            self._make()
        connection = _connect(self._path)
        try:
            found = _version_of(connection)
            if found != self._version:
                raise _OtherVersion(f"the index has version {found}")
            # A power cut may take the last changes, and leaves the file sound.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _make(self) -> None:
        """Put a new file in place, whole."""
        builder = self._path.with_name(f"{self._path.name}.new")
        with locked(self._file_lock):
            # Another process may have been faster.
            if self._path.exists():
                return
            _remove(builder)
            builder.touch(0o600)
            with contextlib.closing(_connect(builder)) as connection:
                # Readers and a writer do not wait for each other.
                connection.execute("PRAGMA journal_mode = WAL")
                _in_transaction(connection, self._write_tables)
            _remove(self._path)
            builder.rename(self._path)

    def _write_tables(self, connection: sqlite3.Connection) -> None:
        for statement in self._schema:
            connection.execute(statement)
        self._fill(connection)
        connection.execute(f"PRAGMA user_version = {self._version}")

    def _replace(self) -> None:
        """Remove the file that was opened last, unless others have done so already."""
        with locked(self._file_lock):
            # Compared while it is open: the number of a closed file may name another one.
            if self._inode_at_path() == self._inode:
                _remove(self._path)
        self._close()

    def _inode_at_path(self) -> int:
        try:
            return os.stat(self._path).st_ino
        except FileNotFoundError:
            return 0


class _OtherVersion(sqlite3.DatabaseError):
    """The file was made by another version of this program."""


def _connect(path: Path) -> sqlite3.Connection:
    """Open a file that exists; each statement outside a transaction stands for itself."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )


def _remove(path: Path) -> None:
    for suffix in _COMPANIONS:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _in_transaction(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    # Writing from its first statement on: of two readers that go on to write, one would fail.
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    return result


def _version_of(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return isinstance(error, _OtherVersion) or _kind(error) in _DAMAGED


def _kind(error: sqlite3.Error) -> int:
    # The lower byte is the kind, the rest says more.
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Say what keeps the file from being used."""
    try:
        yield
    except sqlite3.Error as error:
        if _kind(error) == sqlite3.SQLITE_FULL:
            text = "the disk of the adapter store is full"
            raise AdapterUnavailableError(Reason.STORE_FULL, text) from error
        if _kind(error) in _UNWRITABLE:
            text = "the server cannot write to its adapter store"
            raise AdapterUnavailableError(Reason.STORE_FULL, text) from error
        text = "the adapter store's index cannot be used at the moment"
        raise AdapterUnavailableError(Reason.TRANSIENT, text, detail=f"{path}: {error}") from error
