"""Failures remembered for a while, so that a broken adapter is not fetched for each request."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache

from lorax_contract.adapters import AdapterUnavailableError


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeSettings:
    """How long failures are kept: from ``first`` on, twice as long each time, to ``most``."""

    passing_first_s: float = 1.0
    passing_most_s: float = 60.0
    permanent_first_s: float = 30.0
    permanent_most_s: float = 1800.0
    max_entries: int = 16_384


@dataclass(slots=True)
class _Failure:
    error: AdapterUnavailableError
    count: int
    until: float


class NegativeCache:
    """The last failure per key, and how many there were in a row."""

    def __init__(
        self, settings: NegativeSettings, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._now = now
        self._failures: LRUCache[str, _Failure] = LRUCache(settings.max_entries)

    def get(self, key: str) -> AdapterUnavailableError | None:
        """Return the failure to repeat, with the time until a new try; None: try."""
        failure = self._failures.get(key)
        if failure is None or self._now() >= failure.until:
            return None
        error = failure.error
        return AdapterUnavailableError(
            error.reason, error.text, retry_after_s=failure.until - self._now()
        )

    def failed(self, key: str, error: AdapterUnavailableError) -> None:
        """Remember a failure. Its count outlives its time, so that pauses grow."""
        before = self._failures.pop(key, None)
        same = before is not None and before.error.reason.permanent == error.reason.permanent
        count = before.count + 1 if before is not None and same else 1
        rules = self._settings
        first, most = (
            (rules.permanent_first_s, rules.permanent_most_s)
            if error.reason.permanent
            else (rules.passing_first_s, rules.passing_most_s)
        )
        pause = max(min(first * 2.0 ** min(count - 1, 30), most), error.retry_after_s or 0.0)
        self._failures[key] = _Failure(error, count, self._now() + min(pause, most))

    def succeeded(self, key: str) -> None:
        """Forget the failures of a key."""
        self._failures.pop(key, None)
