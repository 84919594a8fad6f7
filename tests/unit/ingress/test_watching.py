"""What the metrics of an ingress keep of replicas that are gone."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from lorax_ingress.routing.values import RouteDecision, RouteReason
from lorax_ingress.watching import IngressMetrics


class Watched:
    """Metrics at a time of the test's choosing, as Prometheus reads them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.metrics = IngressMetrics(lambda: self.now)
        self._registry = CollectorRegistry()
        self._registry.register(self.metrics)

    def routed(self) -> list[str]:
        lines = generate_latest(self._registry).decode().splitlines()
        return [line for line in lines if line.startswith("lorax_ingress_routed_total{")]


def test_series_of_replicas_that_are_gone_go_after_a_while() -> None:
    watched = Watched()
    for number in range(100):
        name = f"10.0.0.{number}:3100"
        watched.metrics.attached(name)
        for reason in (RouteReason.HOME, RouteReason.LOAD):
            watched.metrics.routed(RouteDecision(name, reason))
        watched.metrics.lost(name)
        watched.now += 60.0
    # Ten minutes' worth, one a minute.
    assert len(watched.routed()) == 2 * 9
    watched.now += 1000.0
    assert watched.routed() == []


def test_one_that_comes_back_goes_on_counting() -> None:
    watched = Watched()
    decision = RouteDecision("a", RouteReason.LOAD)
    watched.metrics.routed(decision)
    watched.metrics.lost("a")
    watched.now = 30.0
    watched.metrics.attached("a")
    watched.now = 5000.0
    watched.metrics.routed(decision)
    assert watched.routed() == ['lorax_ingress_routed_total{reason="load",replica="a"} 2.0']
