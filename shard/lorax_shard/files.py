"""Files that processes share: locks between them, durable and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class FileLock:
    """A lock on a file, shared or exclusive; the kernel frees it however its holder ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Give the lock back; more than once does nothing.

        Whoever is the last to hold it removes the file, so that there are no more of them
        than locks held, and those that killed processes left.
        """
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            # OSError: others hold it too, or the folder can no longer be written.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, self._path):
                    self._path.unlink()
        finally:
            os.close(descriptor)


def acquire(path: Path, *, shared: bool = False, wait: bool = True) -> FileLock | None:
    """Lock the file ``path``, which is made if needed; None: taken, and ``wait`` is False."""
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            # Its last holder may have removed this file while we waited.
            if _is_at(descriptor, path):
                return FileLock(path, descriptor)
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _ignore() -> None:
    """Wait without a word."""


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] = _ignore) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; ``on_wait`` is called once if another one has it."""
    lock = acquire(path, wait=False)
    if lock is None:
        on_wait()
        lock = acquire(path)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def check_writable(folder: Path) -> None:
    """Raise OSError, with its reason, if this process cannot make files in a folder."""
    if not os.access(folder, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        reason = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(reason, os.strerror(reason), str(folder))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the file's JSON object; None if it is missing or not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write so that a reader sees the old document or the whole new one, after a crash too."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Make every file of a folder durable and read-only, and then their names."""
    for path in folder.iterdir():
        if path.is_dir():
            sync_files(path)
            continue
        path.chmod(0o444)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)


def discard(folder: Path, trash: Path, on_step: Callable[[str], None]) -> None:
    """Remove a folder so that it is gone at once, as a whole, and deleted after that."""
    doomed = trash / uuid.uuid4().hex
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    on_step("discarded")
    shutil.rmtree(doomed, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files; what vanishes meanwhile counts nothing."""
    total = 0
    # Unlike Path.rglob, os.walk passes over folders that are gone when it comes to them.
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(parent, name).lstat().st_size
    return total
