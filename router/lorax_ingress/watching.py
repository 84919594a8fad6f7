"""What an ingress does, as Prometheus reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_ingress.routing.values import ReplicaView, RouteDecision, RouteReason


class IngressMetrics(Collector):
    """Counts where requests went and why, and what was lost."""

    def __init__(self) -> None:
        self._routed: Counter[tuple[str, RouteReason]] = Counter()
        self._num_lost = self._num_resumed = self._num_refused = 0
        self.views: dict[str, ReplicaView] = {}

    def routed(self, decision: RouteDecision) -> None:
        """A request was sent to a replica."""
        self._routed[decision.replica, decision.reason] += 1

    def lost(self) -> None:
        """A replica was lost."""
        self._num_lost += 1

    def resumed(self) -> None:
        """A request goes on, or begins anew, at another replica."""
        self._num_resumed += 1

    def refused(self) -> None:
        """A request ended before any replica had it."""
        self._num_refused += 1

    def collect(self) -> Iterator[Metric]:
        """Return all series."""
        routed = CounterMetricFamily(
            "lorax_ingress_routed",
            "Requests that were sent to a replica, by why it was that one.",
            labels=["replica", "reason"],
        )
        for (replica, reason), count in self._routed.items():
            routed.add_metric([replica, reason.value], count)
        yield routed
        yield CounterMetricFamily(
            "lorax_ingress_replicas_lost", "Times a replica was lost.", value=self._num_lost
        )
        yield CounterMetricFamily(
            "lorax_ingress_resumed",
            "Requests that went on at another replica, since the one that they were at was lost.",
            value=self._num_resumed,
        )
        yield CounterMetricFamily(
            "lorax_ingress_refused",
            "Requests that ended before any replica had them.",
            value=self._num_refused,
        )
        yield from _of_views(self.views.values())


def _of_views(views: Iterable[ReplicaView]) -> Iterator[Metric]:
    gauges = {
        "accepting": "Whether a replica takes new requests.",
        "running": "Requests that run at a replica.",
        "queued": "Requests that wait at a replica.",
        "kv_usage": "Share of a replica's KV blocks that requests hold.",
        "adapters": "Adapters on a replica's device.",
    }
    families = {
        name: GaugeMetricFamily(f"lorax_ingress_replica_{name}", text, labels=["replica"])
        for name, text in gauges.items()
    }
    for view in views:
        values = {
            "accepting": float(view.is_accepting),
            "running": view.num_running,
            "queued": view.num_queued,
            "kv_usage": view.kv_in_use,
            "adapters": len(view.resident),
        }
        for name, value in values.items():
            families[name].add_metric([view.name], value)
    yield from families.values()
