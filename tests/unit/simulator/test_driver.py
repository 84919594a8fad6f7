"""The virtual clock around the real scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lorax_contract.config import SCHEDULING_POLICIES
from lorax_contract.errors import ValidationError
from lorax_router.core.cost import LinearCost
from lorax_router.simulator.driver import SimulatedRun, Simulation, StandstillError
from lorax_router.simulator.report import num_computed_once
from lorax_router.simulator.server import PRESETS, SimulatedServer
from lorax_router.simulator.trace import Trace, trace_of_clients
from lorax_router.simulator.workloads.catalog import make_workload

# A step takes a second and a tenth for each of its tokens.
SLOW = SimulatedServer(
    name="slow", cost=LinearCost(1.0, 0.1), kv_tokens=320, max_step_tokens=16, max_rows=8, depth=1,
    host_s=0.0, bytes_per_rank=1000, load_fixed_s=0.5, link_bytes_per_s=16_000, max_adapters=2,
)  # fmt: skip


def requests(
    *columns: tuple[float, int, int], clients: Sequence[int] | None = None, ranks: Any = (0,)
) -> Trace:
    """Return a trace of (time, prompt, output)."""
    times, prompts, outputs = zip(*columns)
    clients = clients or [0] * len(columns)
    return trace_of_clients(
        "t", times=times, clients=clients, prompts=prompts, outputs=outputs, ranks=ranks
    )


def simulate(trace: Trace, server: SimulatedServer = SLOW, policy: str = "fcfs") -> SimulatedRun:
    simulation = Simulation(trace, server, policy, check_every=1)
    run = simulation.run()
    simulation.scheduler.check(is_idle=True)
    assert simulation.scheduler.is_idle
    return run


# --- by hand --------------------------------------------------------------------------


def test_one_request_by_hand() -> None:
    # Steps of 10, 1 and 1 tokens: 2.0, 1.1 and 1.1 s.
    run = simulate(requests((3.0, 10, 3)))
    assert run.first_token_at.tolist() == [5.0]
    assert run.ended_at == pytest.approx([7.2])
    assert run.token_gaps == pytest.approx([1.1, 1.1])
    assert run.num_computed == 12


def test_a_long_prompt_takes_several_steps() -> None:
    # 16, 16 and 8 tokens.
    run = simulate(requests((0.0, 40, 1)))
    assert run.first_token_at == pytest.approx([2.6 + 2.6 + 1.8])


def test_requests_share_a_step() -> None:
    run = simulate(requests((0.0, 4, 2), (0.0, 6, 1)))
    assert run.first_token_at.tolist() == [2.0, 2.0]
    assert run.ended_at.tolist() == [3.1, 2.0]


def test_who_comes_during_a_step_waits_for_its_end() -> None:
    run = simulate(requests((0.0, 4, 3), (0.5, 6, 1)))
    # 4 tokens until 1.4; then 1 + 6.
    assert run.first_token_at == pytest.approx([1.4, 3.1])


def test_an_adapter_is_loaded_before_its_first_request() -> None:
    # Rank 8: 8,000 bytes over 16,000 a second, and the fixed half second.
    run = simulate(requests((0.0, 4, 1), (1.5, 4, 1), ranks=(8,)))
    assert run.first_token_at == pytest.approx([1.0 + 1.4, 2.4 + 1.4])
    assert run.num_loads == 1


def test_loads_go_one_after_the_other_or_side_by_side() -> None:
    trace = requests((0.0, 4, 1), (0.0, 4, 1), clients=[0, 1], ranks=(8, 8))
    # The second is there at 2.0; a step is under way until 2.4 then.
    assert simulate(trace).first_token_at == pytest.approx([2.4, 3.8])
    both = simulate(trace, replace(SLOW, load_concurrency=2))
    assert both.first_token_at == pytest.approx([1.0 + 1.8] * 2)


def test_the_price_of_a_step_has_terms_for_adapters_and_the_cache() -> None:
    cost = LinearCost(0.0, 0.0, kv_token_s=1.0, adapter_byte_s=0.001, token_rank_s=0.01)
    # 4 in the cache, 8,000 bytes, 4 x 8; then 5 in the cache and 1 x 8.
    run = simulate(requests((0.0, 4, 2), ranks=(8,)), replace(SLOW, cost=cost))
    assert run.step_seconds == pytest.approx([4 + 8 + 0.32, 5 + 8 + 0.08])


def test_at_depth_two_the_host_costs_nothing_while_the_device_works() -> None:
    trace = requests((0.0, 4, 5))
    server = replace(SLOW, host_s=0.25)
    lockstep = simulate(trace, server)
    ahead = simulate(trace, replace(server, depth=2))
    assert lockstep.ended_at - ahead.ended_at == pytest.approx([4 * 0.25])


def test_outputs_end_by_themselves_or_by_what_was_asked_for() -> None:
    trace = requests((0.0, 4, 3), (0.0, 4, 5)).asking_for(4)
    run = simulate(trace)
    assert run.ended_at == pytest.approx([1.8 + 1.2 * 2, 1.8 + 1.2 * 2 + 1.1 * 2])


# --- invariants -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
@pytest.mark.parametrize("depth", [1, 2])
def test_every_request_is_served_and_counted_once(policy: str, depth: int) -> None:
    """With preemptions, and adapters that have to take turns."""
    server = replace(SLOW, depth=depth, max_step_tokens=64, max_rows=16)
    trace = make_workload("slora:s2,n=5,rate=4,duration=10,prompt=1-100,output=1-60")
    trace = replace(trace, priorities=np.arange(len(trace)) % 3)
    run = simulate(trace, server, policy)
    assert not np.isnan(run.ended_at).any()
    assert (run.first_token_at > trace.times).all()
    assert (run.ended_at >= run.first_token_at).all()
    assert run.num_preemptions > 0
    assert run.num_loads > 5
    again = run.num_computed - num_computed_once(trace)
    assert again >= 0
    asked = np.bincount(trace.clients, weights=trace.prompts + 2 * trace.outputs)
    assert run.meter.service == asked.tolist()
    assert len(run.token_gaps) == trace.outputs.sum() - len(trace)
    assert min(run.token_gaps) > 0


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
@pytest.mark.parametrize("depth", [1, 2])
def test_every_request_is_served_though_passes_fail(policy: str, depth: int) -> None:
    """Each third, with preemptions and adapters that have to take turns."""
    server = replace(SLOW, depth=depth, max_step_tokens=64, max_rows=16)
    trace = make_workload("slora:s2,n=5,rate=4,duration=10,prompt=1-100,output=1-60")
    run = Simulation(
        trace, server, policy, check_every=1, fails=lambda plan: plan.seq % 3 == 0
    ).run()  # fmt: skip
    assert not np.isnan(run.ended_at).any()
    asked = np.bincount(trace.clients, weights=trace.prompts + 2 * trace.outputs)
    assert run.meter.service == asked.tolist()
    assert len(run.token_gaps) == trace.outputs.sum() - len(trace)


def test_nothing_is_computed_again_where_nobody_gives_way() -> None:
    trace = make_workload("slora:s1,n=5,rate=1,duration=30,prompt=1-20,output=1-20")
    run = simulate(trace, PRESETS["llama-2-7b-a10g"])
    assert run.num_preemptions == 0
    assert run.num_computed == num_computed_once(trace)


def test_a_request_that_can_never_run_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="320 tokens that the KV cache holds"):
        simulate(requests((0.0, 4, 400)))


def test_a_scheduler_that_stands_still_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(requests((0.0, 4, 1)), SLOW, "fcfs")
    monkeypatch.setattr(simulation.scheduler, "plan", lambda now: None)
    with pytest.raises(StandstillError, match="1 requests wait and 0 run"):
        simulation.run()
