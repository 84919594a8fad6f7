"""What the policies promise, over the virtual clock.

Lengths and the KV pool are an eighth of VTC's evaluation, steps take eight times as long: the
same shares and waits in an eighth of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.cost import LinearCost
from lorax_router.core.policies import SchedulingPolicy, make_policy
from lorax_router.core.policies.fair import LOAD_CHARGE, FairShare
from lorax_router.simulator.driver import SimulatedRun, Simulation
from lorax_router.simulator.report import fairness_bound, figures
from lorax_router.simulator.server import SimulatedServer
from lorax_router.simulator.trace import Trace
from lorax_router.simulator.workloads.catalog import make_workload
from lorax_router.simulator.workloads.vtc import SUITES

EIGHTH = SimulatedServer(
    name="an eighth", cost=LinearCost(0.24, 0.015, 7e-5), kv_tokens=1024, max_step_tokens=256,
    max_rows=64, max_adapters=32, bytes_per_rank=1 << 21, cycle_time_s=16.0,
)  # fmt: skip
# (time, tenant, adapter, prompt, output, class)
Asked = tuple[float, int, int, int, int, int]


@cache
def suite(name: str) -> Trace:
    # A few minutes, where that is enough to overload the server.
    cut = "" if name in {"increase", "real"} else ",minutes=4"
    trace = make_workload(f"vtc:{name}{cut}")
    prompts, outputs = (np.maximum(each // 8, 1) for each in (trace.prompts, trace.outputs))
    return replace(trace, prompts=prompts, outputs=outputs, limits=outputs)


def asked(requests: Sequence[Asked], weights: Sequence[float] = (1.0, 1.0)) -> Trace:
    """Return a trace of single requests."""
    columns = np.array(sorted(requests), dtype=np.float64)
    tenants, adapters, prompts, outputs, priorities = columns[:, 1:].astype(np.int64).T
    return Trace(
        name="t", times=columns[:, 0], tenants=tenants, adapters=adapters, prompts=prompts,
        outputs=outputs, limits=outputs, priorities=priorities,
        tenant_names=tuple(f"tenant-{i}" for i in range(len(weights))),
        tenant_weights=tuple(weights),
        adapter_names=("base", *(f"adapter-{i + 1}" for i in range(int(adapters.max())))),
        adapter_ranks=(0, *[8] * int(adapters.max())),
    )  # fmt: skip


def every(seconds: float, until: float, *rest: int, start: float = 0.0) -> list[Asked]:
    """Return a request every so many seconds."""
    count = int((until - start) / seconds)
    return [(start + i * seconds, *rest) for i in range(count)]  # type: ignore[misc]


def simulate(
    trace: Trace, policy: str, server: SimulatedServer = EIGHTH, load_charge: float = LOAD_CHARGE
) -> SimulatedRun:
    def make(name: str, adapters: AdapterTable) -> SchedulingPolicy:
        return FairShare(load_charge=load_charge) if name == "fair" else make_policy(name, adapters)

    simulation = Simulation(trace, server, policy, make=make)
    run = simulation.run()
    simulation.scheduler.check(is_idle=True)
    return run


@cache
def of_suite(name: str, policy: str, kv_tokens: int) -> SimulatedRun:
    return simulate(suite(name), policy, replace(EIGHTH, kv_tokens=kv_tokens))


def waits_of(run: SimulatedRun, chosen: np.ndarray) -> np.ndarray:
    return (run.first_token_at - run.trace.times)[chosen]


@pytest.mark.parametrize("name", [*SUITES, "real"])
def test_service_of_waiting_clients_stays_together_in_every_vtc_suite(name: str) -> None:
    # With a pool in which arrival order breaks the bound in each of them.
    fcfs, fair = (of_suite(name, policy, 640) for policy in ("fcfs", "fair"))
    bound = fairness_bound(fair)["held"]
    assert fcfs.meter.gap > bound
    assert fair.meter.gap <= min(bound, 0.6 * fcfs.meter.gap)


@pytest.mark.parametrize(
    ("name", "kv_tokens"),
    [
        ("overload", 1024), ("proportional", 1024), ("poisson_short_long", 1024), ("dist_shift", 1024),
        # Eight tenants, and memory for ten requests.
        ("overload-multi", 640), ("real", 640),
    ],
)  # fmt: skip
def test_fairness_costs_no_throughput(name: str, kv_tokens: int) -> None:
    fcfs, fair = (figures(of_suite(name, policy, kv_tokens)) for policy in ("fcfs", "fair"))
    assert fair["tokens_per_s"] >= 0.97 * fcfs["tokens_per_s"]


def test_fifty_adapters_get_no_more_than_one() -> None:
    many = [(0.2 * i, 0, 1 + i % 50, 16, 16, 0) for i in range(600)]
    one = every(0.2, 120.0, 1, 51, 16, 16, 0)
    # Bringing an adapter counts for an eighth, as all lengths do.
    server = replace(EIGHTH, max_adapters=8)
    run = simulate(asked([*many, *one]), "fair", server, load_charge=LOAD_CHARGE / 8)
    assert run.num_loads > 50
    assert run.meter.gap <= fairness_bound(run)["held"]
    # Where both still wait they are level.
    level = run.meter.series[len(run.meter.series) // 4]
    assert level[0] <= level[1] + fairness_bound(run)["held"]


@pytest.mark.parametrize("weights", [(1.0, 3.0), (4.0, 1.0)])
def test_shares_are_kept(weights: tuple[float, float]) -> None:
    trace = asked(
        [*every(0.2, 120.0, 0, 1, 16, 16, 0), *every(0.2, 120.0, 1, 2, 16, 16, 0)], weights
    )
    run = simulate(trace, "fair")
    assert run.meter.gap <= fairness_bound(run)["held"]
    place = len(run.meter.series) // 4
    first, second = run.meter.series[place]
    assert first / second == pytest.approx(weights[0] / weights[1], rel=0.15)


def test_a_good_class_hardly_waits_for_a_flood_of_a_worse_one() -> None:
    high = every(3.0, 300.0, 0, 1, 8, 8, 0)
    flood = every(0.5, 300.0, 1, 2, 32, 32, 1)
    alone = simulate(asked(high), "priority")
    run = simulate(asked([*high, *flood]), "priority")
    idle = np.percentile(alone.first_token_at - alone.trace.times, 99)
    step = np.percentile(run.step_seconds, 99)
    # Two steps are under way when it comes, and its own has the next tokens of others.
    others = np.median(run.step_seconds) - EIGHTH.cost.fixed_s
    assert np.percentile(waits_of(run, run.trace.priorities == 0), 99) <= idle + 2 * step + others


def test_a_worse_class_is_not_starved_by_a_flood_of_a_better_one() -> None:
    low = every(10.0, 60.0, 0, 1, 8, 8, 5)
    flood = every(0.1, 60.0, 1, 2, 16, 16, 0)
    run = simulate(asked([*low, *flood]), "priority")
    # The n-th in line waits for at most nine admissions for each of them.
    for index in np.flatnonzero(run.trace.priorities == 5):
        arrived, began = run.trace.times[index], run.first_token_at[index]
        during = (run.first_token_at > arrived) & (run.first_token_at < began)
        ahead = (run.trace.priorities == 5) & (run.trace.times <= arrived)
        ahead &= run.first_token_at > arrived
        assert during.sum() <= 9 * ahead.sum() + EIGHTH.max_rows


@pytest.mark.parametrize(
    ("flood", "slots"),
    [
        ([(0.05 * i, 1, 2, 8, 8, 0) for i in range(2000)], 32),
        # Of cold adapters, with slots for those that run.
        ([(0.5 * i, 1, 2 + i % 100, 8, 4, 0) for i in range(200)], 32),
        # Of so many that some wait for a slot all the time, with short and with long outputs.
        ([(0.1 * i, 1, 2 + i % 100, 8, 8, 0) for i in range(1000)], 16),
        ([(0.1 * i, 1, 2 + i % 100, 8, 32, 0) for i in range(1000)], 16),
    ],
    ids=["requests", "cold adapters", "more than slots", "more than slots, for long"],
)
def test_a_flood_hardly_touches_a_victim(flood: list[Asked], slots: int) -> None:
    victim = every(5.0, 100.0, 0, 1, 16, 8, 0)
    server = replace(EIGHTH, max_adapters=slots)
    alone = simulate(asked(victim), "fair", server)
    run = simulate(asked([*victim, *flood]), "fair", server)
    solo = np.percentile(alone.first_token_at - alone.trace.times, 99)
    step = np.percentile(run.step_seconds, 99)
    assert np.percentile(waits_of(run, run.trace.tenants == 0), 99) <= solo + 3 * step


def test_the_shortest_go_first_and_the_longest_are_served_too() -> None:
    # All there are at once; four run.
    trace = asked([(0.1, 0, 1, 8, 4, 0)] * 20 + [(0.0, 1, 2, 32, 32, 0)] * 12)
    server = replace(EIGHTH, max_rows=4)
    runs = {policy: simulate(trace, policy, server) for policy in ("fcfs", "sjf")}
    waits = {policy: waits_of(run, trace.tenants == 0).mean() for policy, run in runs.items()}
    assert waits["sjf"] < 0.6 * waits["fcfs"]
    assert not np.isnan(runs["sjf"].ended_at).any()
