"""Recompute or swap, over the virtual clock: the choice is right for the rate of the link."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from tests.helpers.swap_world import FixedCost

from lorax_router.core.cost import LinearCost
from lorax_router.core.swapping import RecomputeCost
from lorax_router.simulator.driver import SimulatedRun, Simulation
from lorax_router.simulator.report import num_computed_once
from lorax_router.simulator.server import PRESETS, SimulatedServer
from lorax_router.simulator.trace import Trace, trace_of_clients

# A token takes 1 ms to compute; its kilobyte as long over a link of 1 MB/s.
SERVER = SimulatedServer(
    name="small", cost=LinearCost(0.010, 0.001), kv_tokens=2_000, block_size=16,
    max_step_tokens=256, max_rows=64, host_s=0.0, max_adapters=1, kv_token_bytes=1_000,
)  # fmt: skip


def crowd(num: int = 60) -> Trace:
    """Return requests that together need more than five times the pool at once."""
    return trace_of_clients(
        "crowd", times=[0.01 * n for n in range(num)], clients=[0] * num,
        prompts=[60 + 7 * (n % 5) for n in range(num)], outputs=[90 + 11 * (n % 7) for n in range(num)],
        ranks=(0,),
    )  # fmt: skip


def serve(
    link: float, recompute: RecomputeCost | None = None, *, server: SimulatedServer = SERVER,
    swap_bytes: int = 1 << 30, policy: str = "fcfs",
) -> SimulatedRun:  # fmt: skip
    """Return a run in which everybody is served."""
    server = replace(server, link_bytes_per_s=link, swap_bytes=swap_bytes)
    simulation = Simulation(crowd(), server, policy, check_every=50, recompute=recompute)
    run = simulation.run()
    simulation.scheduler.check(is_idle=True)
    assert simulation.scheduler.stats().host.num_held == 0
    return run


ALWAYS, NEVER = FixedCost(inf), FixedCost(0.0)


@pytest.mark.parametrize(
    ("link", "swaps"), [(1e9, True), (2e7, True), (3e6, True), (1e6, False), (1e5, False)]
)
def test_the_choice_is_that_of_the_faster_run(link: float, swaps: bool) -> None:
    """There and back a token takes 2 kB over the link, or 1 ms: 2 MB/s is where they are equal."""
    free, moved, computed = serve(link), serve(link, ALWAYS), serve(link, NEVER)
    assert moved.num_swaps == moved.num_preemptions > 0
    assert computed.num_swaps == 0 < computed.num_preemptions
    print(f"FIGURE link {link:.0e}: chosen {free.end:.2f} s ({free.num_swaps} of "
          f"{free.num_preemptions} swapped), swap {moved.end:.2f}, recompute {computed.end:.2f}")  # fmt: skip
    # The first steps have no price yet: who gives way in them is moved.
    assert (free.num_swaps > 0.9 * free.num_preemptions) == swaps
    assert (moved.end < computed.end) == swaps
    assert free.end <= min(moved.end, computed.end) * 1.02


def test_what_is_swapped_is_computed_once() -> None:
    run = serve(1e9, ALWAYS)
    assert run.num_computed == num_computed_once(crowd())


@pytest.mark.parametrize("policy", ["fair", "priority", "sjf"])
def test_all_policies_swap(policy: str) -> None:
    run = serve(1e9, policy=policy)
    assert run.num_swaps > 0
    assert run.num_computed == num_computed_once(crowd())


def test_a_bounded_host_memory_takes_some() -> None:
    """Room for 10 blocks: the others are computed again, and everybody is served."""
    run = serve(1e9, swap_bytes=10 * 16 * 1_000)
    assert 0 < run.num_swaps < run.num_preemptions


def test_without_host_memory_nothing_changes() -> None:
    assert serve(1e9, swap_bytes=0).num_swaps == 0
    assert all(server.num_host_blocks == 0 for server in PRESETS.values())


def test_on_the_gpus_of_the_presets_moving_is_the_faster_way() -> None:
    """524 kB a token at 12 GB/s twice beside 0.24 ms; 131 kB at 40 GB/s beside 23 us."""
    for server in PRESETS.values():
        moves = 2 * server.block_move_s < server.block_size * server.cost.token_s
        assert moves
