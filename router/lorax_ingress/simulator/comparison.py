"""Routings side by side on one workload: the runs, their figures, the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorax_ingress.routing.rendezvous import moved
from lorax_ingress.routing.values import RoutingSettings
from lorax_ingress.simulator.fleet import FleetRun, FleetSimulation
from lorax_ingress.simulator.routings import HashRing, make_routing
from lorax_ingress.simulator.workloads import FleetTraffic, make_fleet_trace
from lorax_router.simulator.driver import Simulation
from lorax_router.simulator.server import PRESETS, SimulatedServer

# So long after replicas have joined requests are looked at by themselves.
_AFTER_S = 10.0
FLEET_SERVER = PRESETS["llama-2-7b-a10g"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSetting:
    """How many replicas of what, and how much of what they can do is asked for."""

    num_replicas: int = 100
    num_adapters: int = 10_000
    num_slots: int = 32
    # The part of what the replicas could serve with all adapters in place.
    load: float = 0.75
    duration_s: float = 40.0
    gossip_s: float = 1.0
    alpha: float = 1.0
    # So many of the replicas join when half of the time is over.
    num_joining: int = 0

    @property
    def server(self) -> SimulatedServer:
        """One replica."""
        return replace(FLEET_SERVER, max_adapters=self.num_slots)

    @property
    def names(self) -> list[str]:
        """The replicas' names."""
        return [f"replica-{number}" for number in range(self.num_replicas)]

    @property
    def joins_at(self) -> dict[str, float]:
        """When which replicas join."""
        joining = self.names[self.num_replicas - self.num_joining :]
        return dict.fromkeys(joining, self.duration_s / 2)

    def traffic(self) -> FleetTraffic:
        """Return the traffic of such a load."""
        return FleetTraffic(
            rate=self.load * self.num_replicas * requests_per_s(self.server),
            duration_s=self.duration_s,
            num_adapters=self.num_adapters,
            alpha=self.alpha,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFigures:
    """What is compared. Times are seconds; rates are tokens of prompts and outputs a second."""

    workload: str
    routing: str
    seed: int
    p50_s: float
    p99_s: float
    tokens_per_s: float
    # Adapters brought to devices; those of them from the store; different ones asked for.
    loads: int
    fetches: int
    adapters: int
    requests: int
    # The busiest replica's time at work beside the mean.
    imbalance: float
    # The p99 of requests that come in the ten seconds from when replicas join; 0: none join.
    joined_p99_s: float = 0.0

    @property
    def loads_per_adapter(self) -> float:
        """How often an adapter was brought to a device."""
        return self.loads / self.adapters


def requests_per_s(server: SimulatedServer) -> float:
    """Return what one replica serves when it has enough to do and all adapters in place."""
    trace = make_fleet_trace("steady", FleetTraffic(rate=1000.0, duration_s=1.0, num_adapters=8), 0)
    trace = replace(trace, times=np.zeros(len(trace)))
    return len(trace) / Simulation(trace, server, "fair").run().end


def compare(
    setting: FleetSetting,
    workload: str,
    routings: Sequence[str],
    seed: int,
    settings: RoutingSettings | None = None,
) -> Iterator[FleetFigures]:
    """Serve one workload with each routing; yields figures as runs end."""
    trace = make_fleet_trace(workload, setting.traffic(), seed)
    for name in routings:
        routing = make_routing(name, setting.names, seed, settings)
        run = FleetSimulation(
            trace, setting.server, routing, setting.names, gossip_s=setting.gossip_s,
            joins_at=setting.joins_at,
        ).run()  # fmt: skip
        figures = figures_of(run, workload, name, seed)
        if setting.num_joining:
            figures = replace(figures, joined_p99_s=_joined_p99_s(run, setting.duration_s / 2))
        yield figures


def figures_of(run: FleetRun, workload: str, routing: str, seed: int) -> FleetFigures:
    """Return the figures of a run; first tokens of all its requests count."""
    trace = run.trace
    p50, p99 = np.percentile(run.first_token_at - trace.times, (50, 99))
    num_tokens = int(trace.prompts.sum() + trace.outputs.sum())
    return FleetFigures(
        workload=workload,
        routing=routing,
        seed=seed,
        p50_s=float(p50),
        p99_s=float(p99),
        tokens_per_s=num_tokens / (run.end - float(trace.times[0])),
        loads=sum(run.loads),
        fetches=sum(run.fetches),
        adapters=len(np.unique(trace.adapters[trace.adapters > 0])),
        requests=len(trace),
        imbalance=max(run.busy) / float(np.mean(run.busy)),
    )


def _joined_p99_s(run: FleetRun, joins_at: float) -> float:
    times = run.trace.times
    is_after = (times >= joins_at) & (times < joins_at + _AFTER_S)
    return float(np.percentile((run.first_token_at - times)[is_after], 99))


def moved_shares(num_replicas: int, num_adapters: int) -> dict[str, float]:
    """Return which part of the adapters has another first home once one more replica joins."""
    names = [f"replica-{number}" for number in range(num_replicas + 1)]
    keys = [f"adapter-{number}" for number in range(num_adapters)]
    weights = dict.fromkeys(names, 1.0)
    before = dict.fromkeys(names[:-1], 1.0)
    old, new = HashRing(names[:-1]), HashRing(names)
    num_moved = sum(old.owner(key) != new.owner(key) for key in keys)
    return {
        "affine": len(moved(before, weights, keys)) / num_adapters,
        "consistent": num_moved / num_adapters,
    }


def as_rows(figures: Sequence[FleetFigures]) -> list[str]:
    """Return a table in Markdown, a line for each run."""
    lines = [
        (
            "| workload, seed | routing | p50 first token, s | p99 | tokens/s | loads | per adapter | busiest | "
            "p99 after joins |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each.workload}, {each.seed} | `{each.routing}` | {each.p50_s:.3f} | "
        f"{each.p99_s:.3f} | {each.tokens_per_s:,.0f} | {each.loads:,} | "
        f"{each.loads_per_adapter:.2f} | {each.imbalance:.2f} | {each.joined_p99_s:.3f} |"
        for each in figures
    ]
    return lines
