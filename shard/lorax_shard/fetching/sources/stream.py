"""Bytes on their way to the disk: limits while streaming, resuming, hashing, trying again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_shard.adapter_files import StoredFile
from lorax_shard.fetching.sources.interface import FetchContext, RemoteFile, too_large
from lorax_shard.giving_way import PIECE_BYTES, rest

T = TypeVar("T")

PART = ".part"
# Below this a file is fetched from its start: resuming saves nothing.
_RESUME_FROM_BYTES = 1 << 20
_MAX_PAUSE_S = 20.0
# No file has this size, nor does one go on from there.
_UNKNOWN = -1


class Broken(Exception):
    """A transfer ended before its end; what came is kept and another try goes on from there."""

    def __init__(self, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.retry_after_s = retry_after_s


@dataclass(slots=True, kw_only=True)
class Opened:
    """An answer that sends bytes: where in the file they start, and how long the file is."""

    start: int
    total: int | None
    # The next one may lie where the last one did.
    chunks: Iterator[bytes | memoryview]


class Opener(Protocol):
    """Asks a source for one file from a position on."""

    def __call__(self, start: int) -> contextlib.AbstractContextManager[Opened]:
        """Open the transfer; raises Broken for trouble that may pass."""
        ...


def download(
    what: str, file: RemoteFile, folder: Path, opener: Opener, context: FetchContext
) -> StoredFile:
    """Bring one file into ``folder``, whole and hashed; an earlier try's bytes are kept.

    ``what`` is what the file belongs to, as error texts name it.
    Raises AdapterUnavailableError: too large, corrupt, or broken off too often in a row.
    """
    whole, part = folder / file.name, folder / f"{file.name}{PART}"
    if _is_kept(whole):
        stored = _hashed(whole)
        if _is_announced(stored, file):
            return stored
        context.on_step(f"discard {file.name}")
    whole.unlink(missing_ok=True)
    resumed = _is_kept(part)
    if not resumed:
        part.unlink(missing_ok=True)
    stored = _received(what, file, part, opener, context)
    if resumed and not _is_announced(stored, file):
        # The kept bytes may be the damaged ones: once more from the start.
        part.unlink()
        stored = _received(what, file, part, opener, context)
    if not _is_announced(stored, file):
        part.unlink()
        raise AdapterUnavailableError(
            Reason.CORRUPT, f"{what}: {file.name} is not what its source announced"
        )
    context.on_step(f"whole {file.name}")
    part.rename(whole)
    return stored


def _is_kept(path: Path) -> bool:
    """Whether what an earlier try left is worth a look; only that was made durable."""
    return path.exists() and path.stat().st_size >= _RESUME_FROM_BYTES


def _is_announced(stored: StoredFile, file: RemoteFile) -> bool:
    return file.size in (None, stored.size) and file.sha256 in (None, stored.sha256)


def _received(
    what: str, file: RemoteFile, part: Path, opener: Opener, context: FetchContext
) -> StoredFile:
    """Return the facts of ``part`` once all of it has come."""
    growing = _Growing()

    def attempt() -> bool:
        context.on_step(f"open {file.name}")
        before = _size(part)
        try:
            with (
                disk_errors(what, file.name, context.limits.of_file(file.name)),
                opener(before) as opened,
                _sink(part, opened.start) as sink,
            ):
                _pour(what, file, opened, sink, context, growing)
        except Broken:
            if _size(part) <= before:
                raise
            # Something came: the tries that bring nothing are counted anew.
            context.pause(context.limits.backoff_s)
            return False
        return True

    while not retried(what, attempt, context):
        pass
    size, sha256 = _size(part), growing.sha256
    if growing.size != size:
        # An earlier try, of another process, left some of it.
        size, sha256 = (stored := _hashed(part)).size, stored.sha256
    return StoredFile(name=file.name, size=size, sha256=sha256)


class _Growing:
    """The digest of a file that grows, if it was seen from its start on."""

    def __init__(self) -> None:
        self._digest, self.size = hashlib.sha256(), 0

    @property
    def sha256(self) -> str:
        """The digest of the first ``size`` bytes, as hexadecimal digits."""
        return self._digest.hexdigest()

    def take(self, start: int, data: bytes | memoryview) -> None:
        """Take in what the file has from ``start`` on, which is its start or where it ended."""
        if start == 0:
            self._digest, self.size = hashlib.sha256(), 0
        if start != self.size:
            self.size = _UNKNOWN
            return
        self._digest.update(data)
        self.size += len(data)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def retried(what: str, attempt: Callable[[], T], context: FetchContext) -> T:
    """Return ``attempt()``, tried again after Broken with growing pauses, until the deadline."""
    for number in range(1, context.limits.attempts + 1):
        context.check_deadline(what)
        try:
            return attempt()
        except Broken as broken:
            if number == context.limits.attempts:
                raise AdapterUnavailableError(
                    Reason.TRANSIENT,
                    f"{what}: {broken.text}",
                    retry_after_s=broken.retry_after_s,
                ) from broken
            # Spread, so that many that broke off together do not return together.
            own = context.limits.backoff_s * 2 ** (number - 1) * random.uniform(0.75, 1.25)
            wanted = broken.retry_after_s or 0.0
            room = max(0.0, context.deadline - context.now())
            context.pause(min(max(own, wanted), _MAX_PAUSE_S, room))
    raise AssertionError("unreachable: the last attempt returns or raises")


@contextlib.contextmanager
def _sink(part: Path, start: int) -> Iterator[BinaryIO]:
    with part.open("r+b" if part.exists() else "w+b") as file:
        # A source that does not resume sends the file from its start.
        file.truncate(start)
        file.seek(start)
        try:
            yield file
        finally:
            file.flush()
            if _is_kept(part):
                os.fsync(file.fileno())


def _pour(
    what: str,
    file: RemoteFile,
    opened: Opened,
    sink: BinaryIO,
    context: FetchContext,
    growing: _Growing,
) -> None:
    limit = context.limits.of_file(file.name)
    if opened.total is not None and opened.total > limit:
        raise too_large(what, file.name, opened.total, limit)
    done = opened.start
    for chunk in opened.chunks:
        start, done = done, done + len(chunk)
        if done > limit:
            raise too_large(what, file.name, None, limit)
        sink.write(chunk)
        # Now, while it is in the cache: nobody reads the file again for it.
        growing.take(start, chunk)
        rest()
        context.on_bytes(len(chunk))
        context.on_step(f"bytes of {file.name}")
        context.check_deadline(what)
    if opened.total is not None and done < opened.total:
        raise Broken(f"{file.name} broke off after {done:,} of {opened.total:,} bytes")


@contextlib.contextmanager
def disk_errors(what: str, name: str, limit: int) -> Iterator[None]:
    """Say in words that a file passed the process' limit, or that the disk takes none."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise too_large(what, name, None, limit) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AdapterUnavailableError(
                Reason.STORE_FULL, f"{what}: the disk of the adapter store is full"
            ) from error
        if error.errno == errno.EROFS:
            raise AdapterUnavailableError(
                Reason.STORE_FULL, f"{what}: the server cannot write to its adapter store"
            ) from error
        raise


def _hashed(path: Path) -> StoredFile:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(PIECE_BYTES):
            digest.update(chunk)
            size += len(chunk)
            rest()
    return StoredFile(name=path.name, size=size, sha256=digest.hexdigest())
