"""How long outputs will be, by adapter: an adapter has one task, and its lengths show it."""

from __future__ import annotations

from math import log2

from lorax_contract.step import AdapterHandle

# Two buckets an octave, up to a million tokens.
_PER_OCTAVE = 2
_NUM_BUCKETS = 20 * _PER_OCTAVE + 1
# What an older observation counts for beside the next one.
_FADE = 0.98
# Observations before an adapter's own are believed.
_MIN_WEIGHT = 4.0
_MAX_ADAPTERS = 10_000


class _Histogram:
    __slots__ = ("_counts", "total")

    def __init__(self) -> None:
        self._counts = [0.0] * _NUM_BUCKETS
        self.total = 0.0

    def add(self, length: int) -> None:
        self._counts = [each * _FADE for each in self._counts]
        self._counts[min(round(log2(length) * _PER_OCTAVE), _NUM_BUCKETS - 1)] += 1.0
        self.total = self.total * _FADE + 1.0

    def median(self) -> float:
        below = 0.0
        for bucket, count in enumerate(self._counts):
            below += count
            if 2.0 * below >= self.total:
                return float(2.0 ** (bucket / _PER_OCTAVE))
        return 1.0


class OutputLengths:
    """Fading medians, learned from outputs that came to their own end."""

    def __init__(self) -> None:
        self._all = _Histogram()
        self._by_adapter: dict[AdapterHandle, _Histogram] = {}

    def observe(self, adapter: AdapterHandle, length: int) -> None:
        """An output ended."""
        if length < 1:
            return
        histogram = self._by_adapter.pop(adapter, None) or _Histogram()
        # The one observed longest ago is the first to be forgotten.
        self._by_adapter[adapter] = histogram
        if len(self._by_adapter) > _MAX_ADAPTERS:
            del self._by_adapter[next(iter(self._by_adapter))]
        histogram.add(length)
        self._all.add(length)

    def predict(self, adapter: AdapterHandle, most: int) -> float:
        """Return the expected tokens of an output that has at most ``most``."""
        histogram = self._by_adapter.get(adapter)
        if histogram is None or histogram.total < _MIN_WEIGHT:
            histogram = self._all
        if histogram.total < _MIN_WEIGHT:
            return float(most)
        return min(histogram.median(), float(most))
