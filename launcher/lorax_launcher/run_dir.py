"""The private folder of one run: sockets and the children's configurations."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_launcher.options import UsageError

_PREFIX = "lorax-"
_LOCK = "lock"
# A longer parent would make the path of a socket longer than the system allows.
_LONGEST_PARENT = 64


@contextmanager
def run_directory() -> Iterator[Path]:
    """Make a folder that only this user can enter, and remove it at the end.

    Folders of launchers that were killed before they could tidy up are removed first.
    """
    folder = _make_folder()
    lock = _hold(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_folder() -> Path:
    try:
        base = tempfile.gettempdir()
        fits = len(base.encode()) <= _LONGEST_PARENT
        parent = Path(base if fits else "/tmp")  # noqa: S108  mkdtemp makes the folder private
        sweep(parent)
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise UsageError(
            f"no private folder can be made for the run: {error.strerror or error}; set TMPDIR to "
            "a folder that can be written, with a short path."
        ) from error


def sweep(parent: Path) -> None:
    """Remove the folders of this user whose launcher is gone: nobody holds their lock."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            if lock.lstat().st_uid != os.getuid() or lock.is_symlink():
                continue
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its launcher lives
        else:
            shutil.rmtree(lock.parent, ignore_errors=True)
        finally:
            os.close(descriptor)


def _hold(folder: Path) -> int:
    """Lock the folder for as long as this process lives.

    The file gets its name once it is locked, so that no sweep can come in between.
    """
    unnamed = folder / f"{_LOCK}.new"
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unnamed.rename(folder / _LOCK)
    return descriptor
