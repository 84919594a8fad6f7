"""Runs over the virtual clock, each made once and shared by the points that look at it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from lorax_router.simulator.driver import SimulatedRun, Simulation
from lorax_router.simulator.report import fairness_bound, figures
from lorax_router.simulator.server import PRESETS, SimulatedServer
from lorax_router.simulator.trace import Trace
from lorax_router.simulator.workloads.catalog import make_workload

# VTC's own pair of model and device.
A10G = PRESETS["llama-2-7b-a10g"]


class Outcome:
    """A run's figures; the run itself is let go."""

    def __init__(self, run: SimulatedRun) -> None:
        self.bound = fairness_bound(run)
        self.figures: dict[str, Any] = figures(run)
        self.waits = run.first_token_at - run.trace.times
        self.step_seconds = run.step_seconds


@cache
def named(workload: str, policy: str, kv_tokens: int) -> Outcome:
    """Return what comes of a workload of the catalog on VTC's server with a pool of that size."""
    return simulate(make_workload(workload), policy, replace(A10G, kv_tokens=kv_tokens))


def simulate(trace: Trace, policy: str, server: SimulatedServer) -> Outcome:
    """Return what comes of a trace; the scheduler's invariants hold at its end."""
    simulation = Simulation(trace, server, policy)
    run = simulation.run()
    simulation.scheduler.check(is_idle=True)
    return Outcome(run)
