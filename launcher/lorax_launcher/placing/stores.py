"""A folder of adapters for each server of a machine: kept over restarts, and never shared."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def store_folder(base: Path) -> Iterator[Path]:
    """Hold the first folder below ``base`` that no other process of this machine holds.

    A server that comes after another one finds that one's adapters.
    """
    for number in itertools.count(1):
        folder = base / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        try:
            yield folder
        finally:
            os.close(lock)
        return
