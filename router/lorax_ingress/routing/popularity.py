"""Which part of the traffic an adapter has, and how many homes that takes."""

from __future__ import annotations

from heapq import nlargest
from math import ceil, sqrt


class Popularity:
    """Traffic by adapter, of which the past counts half after each half-life.

    Args:
        half_life_s: that time.
        home_share: the part of a mean replica that an adapter may fill in each of its homes.
        shrink_at: below this part of the traffic that takes its homes it loses some.
        max_keys: adapters that are remembered; those with the least traffic go.
    """

    def __init__(
        self, *, half_life_s: float, home_share: float, shrink_at: float, max_keys: int
    ) -> None:
        self._decay = -1.0 / half_life_s
        self._home_share, self._shrink_at = home_share, shrink_at
        self._max_keys = max_keys
        # Work so far and requests so far, and when that was.
        self._rates: dict[str, tuple[float, float, float]] = {}
        self._total, self._total_at = 0.0, 0.0
        self._began_at: float | None = None
        # Of those that have more than one.
        self._homes: dict[str, int] = {}

    @property
    def num_known(self) -> int:
        """Adapters that were asked for, as far as they are remembered."""
        return len(self._rates)

    def note(self, key: str | None, work: float, now: float) -> None:
        """Book a request; None is the base model, which is part of all traffic and needs no home."""
        if self._began_at is None:
            self._began_at = now
        self._total = self._total * self._fade(self._total_at, now) + work
        self._total_at = now
        if key is None:
            return
        before, num, at = self._rates.get(key, (0.0, 0.0, now))
        fade = self._fade(at, now)
        self._rates[key] = (before * fade + work, num * fade + 1.0, now)
        if len(self._rates) > self._max_keys:
            self._forget(now)

    def _fade(self, since: float, now: float) -> float:
        return float(2.0 ** ((now - since) * self._decay)) if now > since else 1.0

    def share(self, key: str, now: float) -> float:
        """Return the part of all recent work that is an adapter's."""
        work, _, at = self._rates.get(key, (0.0, 0.0, now))
        total = self._total * self._fade(self._total_at, now)
        return work * self._fade(at, now) / total if total > 0 else 0.0

    def recent(self, key: str, now: float) -> float:
        """Return how many requests of an adapter there were of late, old ones in part."""
        _, num, at = self._rates.get(key, (0.0, 0.0, now))
        return num * self._fade(at, now)

    def hottest(self, most: int, least: float, now: float) -> list[str]:
        """Return at most so many adapters with so many requests of late, the hottest first."""
        recent = {key: self.recent(key, now) for key in self._rates}
        found = [key for key in recent if recent[key] >= least]
        return nlargest(most, found, key=lambda key: recent[key])

    def seen(self, now: float) -> float:
        """Return which part of what traffic leaves behind for ever is there yet, from 0 to 1."""
        return 1.0 - self._fade(now if self._began_at is None else self._began_at, now)

    def num_homes(self, key: str, num_replicas: int, now: float) -> int:
        """Return how many homes an adapter has, from 1 to the number of replicas.

        They grow with its share of the work, as far as its requests are too many for chance; and
        shrink only when it is well below what the last of them takes.
        """
        held = min(self._homes.get(key, 1), num_replicas)
        num = self.recent(key, now)
        if num < 1.0 and held == 1:
            return 1
        filled = self.share(key, now) * num_replicas / self._home_share
        if (sure := filled * max(1.0 - 1.0 / sqrt(num), 0.0) if num > 0 else 0.0) > held:
            held = min(ceil(sure), num_replicas)
        elif filled < self._shrink_at * (held - 1):
            held = max(ceil(filled), 1)
        self._keep(key, held)
        return held

    def _keep(self, key: str, held: int) -> None:
        if held > 1:
            self._homes[key] = held
        else:
            self._homes.pop(key, None)

    def _forget(self, now: float) -> None:
        """Let go of the half that has the least traffic."""
        order = sorted(self._rates, key=lambda key: -self._faded(key, now))
        self._rates = {key: self._rates[key] for key in order[: self._max_keys // 2]}
        self._homes = {key: held for key, held in self._homes.items() if key in self._rates}

    def _faded(self, key: str, now: float) -> float:
        work, _, at = self._rates[key]
        return work * self._fade(at, now)
