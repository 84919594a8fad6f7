"""Tells whether files are still what they were, without reading them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

# Seconds between two looks.
_INTERVAL_S = 2.0

_Stamp = tuple[tuple[int, int, int, int] | None, ...]


class FileWatch:
    """Calls ``on_change`` when one of some files was written, replaced, removed or is back.

    A file that is a link is what it leads to: so are secrets mounted in containers, which are
    replaced by changing a link.
    """

    def __init__(self, paths: Sequence[str], on_change: Callable[[], None]) -> None:
        self._paths = tuple(paths)
        self._on_change = on_change
        self._stamp = self._look()

    def check(self) -> None:
        """Look once."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            self._on_change()

    async def follow(self, interval_s: float = _INTERVAL_S) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            self.check()

    def _look(self) -> _Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: str) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
