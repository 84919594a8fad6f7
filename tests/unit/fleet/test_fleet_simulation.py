"""Replicas over one virtual clock, and what routing makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from lorax_ingress.routing.preloads import Preload
from lorax_ingress.routing.values import ReplicaView, RouteRequest, RoutingSettings
from lorax_ingress.simulator.__main__ import main
from lorax_ingress.simulator.comparison import (
    FLEET_SERVER,
    FleetFigures,
    FleetSetting,
    compare,
    moved_shares,
)
from lorax_ingress.simulator.fleet import FleetRun, FleetSimulation
from lorax_ingress.simulator.routings import make_routing
from lorax_ingress.simulator.tiers import FleetStore
from lorax_ingress.simulator.workloads import FleetTraffic, make_fleet_trace
from lorax_router.simulator.service import ServiceMeter, vtc_bound
from lorax_router.simulator.trace import Trace, trace_of_clients

SMALL = FleetSetting(num_replicas=3, num_adapters=24, num_slots=8, load=0.3, duration_s=60.0)


def figures(
    setting: FleetSetting, routing: str, seed: int, workload: str = "steady"
) -> FleetFigures:
    (made,) = compare(setting, workload, [routing], seed)
    return made


# --- adapters ---------------------------------------------------------------------------


def test_adapters_that_fit_are_brought_once() -> None:
    """24 adapters in 24 slots, skewed: 1.3 loads each at most."""
    light = replace(SMALL, load=0.2)
    for seed in range(1, 5):
        ours = figures(light, "affine", seed)
        assert ours.adapters == 24
        assert ours.loads_per_adapter <= 1.3
    assert figures(light, "random", 1).loads_per_adapter > 2.6


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_more_adapters_than_slots_take_half_of_what_random_routing_takes(load: float) -> None:
    setting = replace(SMALL, num_adapters=40, load=load)
    for seed in (1, 2):
        ours, drawn = (figures(setting, name, seed) for name in ("affine", "random"))
        assert ours.loads <= drawn.loads / 2
        assert ours.p99_s < drawn.p99_s
        assert ours.tokens_per_s >= 0.95 * drawn.tokens_per_s


def test_a_replica_that_joins_under_load_has_its_adapters_before_requests() -> None:
    setting = FleetSetting(
        num_replicas=5, num_adapters=100, load=0.75, duration_s=40.0, num_joining=1, gossip_s=0.25
    )
    made = [
        [
            next(compare(setting, "steady", ["affine"], seed, RoutingSettings(preloads=preloads)))
            for seed in (1, 2, 3)
        ]
        for preloads in (True, False)
    ]
    p99s = [float(np.mean([each.joined_p99_s for each in some])) for some in made]
    assert p99s[0] < p99s[1]
    # It is free slots that are filled.
    for ours, former in zip(*made, strict=True):
        assert former.loads <= ours.loads <= former.loads + setting.num_slots


def test_a_fleet_with_drifting_traffic() -> None:
    """What docs/scaling.md shows for 100 replicas, with 20 and fewer adapters."""
    setting = FleetSetting(num_replicas=20, num_adapters=2000, load=0.75, duration_s=20.0)
    runs = {
        each.routing: each
        for each in compare(setting, "drift", ["affine", "random", "consistent"], 1)
    }
    ours = runs["affine"]
    assert ours.p99_s < min(runs["random"].p99_s, runs["consistent"].p99_s)
    assert ours.loads <= 1.2 * runs["consistent"].loads
    assert ours.loads < 0.6 * runs["random"].loads


# --- the clock --------------------------------------------------------------------------


def run(routing: str, gossip_s: float = 1.0, seed: int = 3) -> FleetRun:
    trace = make_fleet_trace(
        "bursts", FleetTraffic(rate=20.0, duration_s=15.0, num_adapters=60), seed
    )
    server = replace(FLEET_SERVER, max_adapters=8)
    names = ["a", "b", "c", "d"]
    made = FleetSimulation(
        trace, server, make_routing(routing, names, seed), names, gossip_s=gossip_s
    )
    done = made.run()
    for replica in made.replicas:
        replica.scheduler.check()
    return done


@pytest.mark.parametrize("routing", ["affine", "random", "round_robin", "consistent"])
def test_all_requests_are_served_and_the_same_again(routing: str) -> None:
    one, other = run(routing), run(routing)
    assert not np.isnan(one.ended_at).any()
    assert (one.first_token_at > one.trace.times).all()
    assert np.array_equal(one.first_token_at, other.first_token_at)
    assert one.loads == other.loads
    assert all(fetches <= loads for fetches, loads in zip(one.fetches, one.loads))


def test_old_views_do_little_harm() -> None:
    """The router counts what it sent itself: views that are seconds old are enough."""
    fresh, old = run("affine", 0.1), run("affine", 4.0)
    p99 = [np.percentile(each.first_token_at - each.trace.times, 99) for each in (fresh, old)]
    assert p99[1] < 2.0 * p99[0]


def test_the_store_is_farther_than_host_memory() -> None:
    setting = replace(SMALL, num_adapters=60)
    trace = make_fleet_trace("steady", setting.traffic(), 1)
    waits = []
    for fixed_s in (0.0, 1.0):
        routing = make_routing("affine", setting.names, 1)
        store = FleetStore(fixed_s=fixed_s)
        done = FleetSimulation(trace, setting.server, routing, setting.names, store=store).run()
        waits.append(np.mean(done.first_token_at - trace.times))
    assert waits[1] > waits[0] + 0.1


def test_one_more_replica_moves_its_part() -> None:
    shares = moved_shares(100, 10_000)
    assert shares["affine"] == pytest.approx(1 / 101, abs=0.004)
    # Places on a ring are uneven.
    assert 0.004 < shares["consistent"] < 0.02


def test_the_command_prints_a_table() -> None:
    options = (
        "--replicas 2 --adapters 10 --slots 4 --duration 2 --workload steady --seed 1 --seed 2"
    )
    done = CliRunner().invoke(main, options.split())
    assert done.exit_code == 0, done.output
    assert done.output.count("| `affine` |") == 2
    assert "one more replica moves" in done.output


# --- fairness over replicas ---------------------------------------------------------------


class _ByTenant:
    """Tenant 0 goes to three replicas in turns, tenant 1 to the first two: their adapters are there."""

    has_views = True

    def __init__(self) -> None:
        self._next = {"adapter-0": 0, "adapter-1": 0}

    def choose(self, request_id: str, request: RouteRequest, now: float) -> str:
        key = request.adapter or ""
        self._next[key] += 1
        return "abc"[self._next[key] % (3 if key == "adapter-0" else 2)]

    def see(self, view: ReplicaView) -> None: ...
    def take_preloads(self) -> Sequence[Preload]:
        return ()

    def begins(self, request_id: str) -> None: ...
    def ended(self, request_id: str, now: float) -> None: ...


def backlog(rates: tuple[float, float], seconds: float) -> Trace:
    """Two tenants that ask for more than all replicas can do, of prompts and outputs of one length."""
    times, clients = [], []
    for client, rate in enumerate(rates):
        own = np.arange(0.0, seconds, 1.0 / rate)
        times.append(own)
        clients.append(np.full(len(own), client))
    num = sum(map(len, times))
    return trace_of_clients(
        "backlog", times=np.concatenate(times), clients=np.concatenate(clients),
        prompts=[256] * num, outputs=[64] * num, ranks=[16, 16],
    )  # fmt: skip


def service_gap(*, is_fair: bool) -> tuple[float, float]:
    """Return the largest gap of service between the tenants over all replicas, and VTC's bound of one."""
    trace = backlog((45.0, 30.0), 40.0)
    server = replace(FLEET_SERVER, kv_tokens=4096)
    meter = ServiceMeter(trace.client_weights, [0, 1], 1.0)
    FleetSimulation(
        trace, server, _ByTenant(), list("abc"), gossip_s=0.5, meter=meter, is_fair=is_fair
    ).run()
    return meter.gap, vtc_bound(256, server.kv_tokens)


def test_tenants_stay_within_twice_the_bound_of_one_over_three_replicas() -> None:
    gap, bound = service_gap(is_fair=True)
    assert gap <= 2 * bound


def test_without_telling_each_other_they_do_not() -> None:
    gap, bound = service_gap(is_fair=False)
    assert gap > 2 * bound
