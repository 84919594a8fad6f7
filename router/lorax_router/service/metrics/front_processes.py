"""Series about the processes that speak HTTP for the router (``--http-workers``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_router.service.metrics.spec import MetricSpec

FRONT_CPU = MetricSpec(
    "lorax_front_cpu_seconds",
    "counter",
    "Processor seconds of a front process (`--http-workers`), since it was started.",
    ("front",),
)
FRONT_MEMORY = MetricSpec(
    "lorax_front_resident_bytes", "gauge", "Bytes of memory that a front process holds.", ("front",)
)
FRONT_CONNECTIONS = MetricSpec(
    "lorax_front_connections",
    "gauge",
    "Open connections of clients of a front process.",
    ("front",),
)
FRONT_RESTARTS = MetricSpec(
    "lorax_front_restarts", "counter", "Times a front process that ended was started again."
)
FRONT_METRICS = (FRONT_CPU, FRONT_MEMORY, FRONT_CONNECTIONS, FRONT_RESTARTS)


class FrontUsage(NamedTuple):
    """What one front takes."""

    number: int
    num_connections: int
    cpu_s: float
    resident_bytes: int


class FrontSeries(Collector):
    """Reads at each scrape what the fronts take.

    Args:
        usages: of those that run.
        num_restarts: of all, since the start.
    """

    def __init__(
        self, usages: Callable[[], Iterable[FrontUsage]], num_restarts: Callable[[], int]
    ) -> None:
        self._usages = usages
        self._num_restarts = num_restarts

    def collect(self) -> Iterator[Metric]:
        """Yield a snapshot."""
        cpu = CounterMetricFamily(FRONT_CPU.name, FRONT_CPU.text, labels=FRONT_CPU.labels)
        memory, connections = (
            GaugeMetricFamily(spec.name, spec.text, labels=spec.labels)
            for spec in (FRONT_MEMORY, FRONT_CONNECTIONS)
        )
        for usage in self._usages():
            label = [str(usage.number)]
            cpu.add_metric(label, usage.cpu_s)
            memory.add_metric(label, usage.resident_bytes)
            connections.add_metric(label, usage.num_connections)
        yield from (cpu, memory, connections)
        yield CounterMetricFamily(
            FRONT_RESTARTS.name, FRONT_RESTARTS.text, value=self._num_restarts()
        )
