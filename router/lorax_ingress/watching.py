"""What an ingress does, as Prometheus reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from time import monotonic

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_ingress.routing.values import ReplicaView, RouteDecision, RouteReason

# So long the counters of a replica that is gone are kept: what reads them has read them by then, and
# one that only starts anew goes on where it was.
_KEPT_S = 600.0


class IngressMetrics(Collector):
    """Counts where requests went and why, and what was lost.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._routed: Counter[tuple[str, RouteReason]] = Counter()
        # Since when replicas are gone that had requests.
        self._gone: dict[str, float] = {}
        self._preloads: Counter[str] = Counter()
        self._num_lost = self._num_resumed = self._num_refused = 0
        self.views: dict[str, ReplicaView] = {}

    def routed(self, decision: RouteDecision) -> None:
        """A request was sent to a replica."""
        self._routed[decision.replica, decision.reason] += 1

    def preloaded(self, replica: str, num: int) -> None:
        """A replica was told to load so many adapters before requests come for them."""
        self._preloads[replica] += num

    def attached(self, name: str) -> None:
        """A replica is there, perhaps again."""
        self._gone.pop(name, None)

    def lost(self, name: str) -> None:
        """A replica was lost."""
        self._num_lost += 1
        self._gone[name] = self._clock()
        self._drop_series()

    def _drop_series(self) -> None:
        """Forget replicas that are gone for long: pods have new names each time."""
        since = self._clock() - _KEPT_S
        old = {name for name, gone_at in self._gone.items() if gone_at <= since}
        for key in [each for each in self._routed if each[0] in old]:
            del self._routed[key]
        for name in old:
            del self._gone[name]
            self._preloads.pop(name, None)

    def resumed(self) -> None:
        """A request goes on, or begins anew, at another replica."""
        self._num_resumed += 1

    def refused(self) -> None:
        """A request ended before any replica had it."""
        self._num_refused += 1

    def collect(self) -> Iterator[Metric]:
        """Return all series."""
        self._drop_series()
        routed = CounterMetricFamily(
            "lorax_ingress_routed",
            "Requests that were sent to a replica, by why it was that one.",
            labels=["replica", "reason"],
        )
        for (replica, reason), count in self._routed.items():
            routed.add_metric([replica, reason.value], count)
        yield routed
        preloads = CounterMetricFamily(
            "lorax_ingress_preloads",
            "Adapters that a replica was told to load before requests come for them.",
            labels=["replica"],
        )
        for replica, count in self._preloads.items():
            preloads.add_metric([replica], count)
        yield preloads
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
