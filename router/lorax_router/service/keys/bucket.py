"""A token bucket: how much of something may be taken in a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class TokenBucket:
    """Fills at a steady rate, up to what a minute brings.

    More may be taken than is there: then it is owed, and nothing is left until it is paid.
    What costs nobody knows beforehand is so let in as long as something is there, and over
    time nobody takes more than the rate.

    Args:
        per_minute: what comes in each minute.
        clock: monotonic seconds.
        before: what was taken of it elsewhere before it was made: when, and how much.
    """

    def __init__(
        self,
        per_minute: int,
        clock: Callable[[], float],
        before: Iterable[tuple[float, float]] = (),
    ) -> None:
        self._clock = clock
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._filled_at = float("-inf")
        # What was taken here.
        self.taken = 0.0
        for at, number in before:
            self._fill(at)
            self._level -= number
        self._fill()

    @property
    def per_minute(self) -> int:
        """What comes in each minute."""
        return self._per_minute

    def set_rate(self, per_minute: int) -> None:
        """Fill at another rate from now on; what was taken stays taken."""
        self._fill()
        taken = self._per_minute - self._level
        self._per_minute = per_minute
        self._level = min(per_minute - taken, float(per_minute))

    def wait_s(self) -> float:
        """Seconds until something can be taken; 0: now."""
        self._fill()
        return max(0.0, (1.0 - self._level) * 60.0 / self._per_minute)

    def take(self, number: float) -> None:
        """Take so much, whatever is there."""
        self.taken += number
        self.take_elsewhere(number)

    def take_elsewhere(self, number: float) -> None:
        """So much was taken where somebody else counts."""
        self._fill()
        self._level -= number

    def _fill(self, at: float | None = None) -> None:
        now = self._clock() if at is None else at
        came = (now - self._filled_at) * self._per_minute / 60.0
        self._level = min(self._level + came, float(self._per_minute))
        self._filled_at = now
