"""A histogram that counts once what several names show."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_router.service.metrics.spec import MetricSpec


@dataclass(frozen=True, slots=True)
class HistogramView:
    """One name of a histogram, with buckets of its own and labels that never change."""

    spec: MetricSpec
    buckets: tuple[float, ...]
    labels: Mapping[str, str] = field(default_factory=dict)


class SharedHistogram(Collector):
    """Counts a value once, by the buckets of all its views: cheap enough for every token."""

    def __init__(self, *views: HistogramView) -> None:
        self._views = views
        self._bounds = tuple(sorted({bound for view in views for bound in view.buckets}))
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value`` so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self._counts)

    def collect(self) -> Iterator[Metric]:
        """Return one family of cumulative buckets for each view."""
        below = dict(zip(self._bounds, accumulate(self._counts), strict=False))
        total = self.count
        for view in self._views:
            family = HistogramMetricFamily(view.spec.name, view.spec.text, labels=[*view.labels])
            buckets = [(repr(float(bound)), float(below[bound])) for bound in view.buckets]
            family.add_metric([*view.labels.values()], [*buckets, ("+Inf", total)], self._sum)
            yield family
