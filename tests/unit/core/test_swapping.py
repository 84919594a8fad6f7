"""Requests that give way to host memory and come back, and cached blocks that wait there."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Sequence
from math import inf

import pytest
from tests.helpers.core_world import CoreWorld
from tests.helpers.swap_world import SwapWorld

from lorax_contract.step import BlockId, RequestId, RequestSpec, SamplingParams, StoppingParams
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.cost import CostFit, StepWork
from lorax_router.core.policies.fair import FairShare
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.policies.priority import StrictPriority
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.policies.shortest import ShortestFirst
from lorax_router.core.request import ANY_TERMS, RequestState, RequestTerms
from lorax_router.core.swapping import FittedRecompute

NUM_STEPS = int(os.environ.get("LORAX_MACHINE_STEPS", "1000"))
POLICIES = [FirstComeFirstServed, FairShare, StrictPriority, ShortestFirst]


def test_a_swapped_request_resumes_with_no_recomputation():
    world = SwapWorld(prefix_caching=False)
    requests = [world.submit([number] * 6, 20) for number in range(3)]
    world.finish()
    assert world.scheduler.stats().host.num_swaps > 0
    for request in requests:
        # All but the last token of the output, each once.
        assert world.computed[request] == 6 + 20 - 1
    assert world.num_out == world.num_in


def test_without_host_memory_the_same_load_is_computed_anew():
    world = SwapWorld(num_host_blocks=0, prefix_caching=False)
    requests = [world.submit([number] * 6, 20) for number in range(3)]
    world.finish()
    assert world.num_out == 0
    assert sum(world.computed[request] for request in requests) > 3 * 25


def test_tokens_of_a_step_in_flight_are_swapped_with_the_rest():
    """At depth 3 a row gives way while steps that compute it are on their way."""
    world = SwapWorld(prefix_caching=False, depth=3)
    requests = [world.submit([number] * 5, 22) for number in range(4)]
    world.finish()
    assert world.scheduler.stats().host.num_swaps > 0
    assert [world.computed[request] for request in requests] == [26] * 4


def test_blocks_for_drafts_stay_behind():
    """Blocks that are granted for what may be kept of drafts hold nothing: who comes back needs none."""
    world = SwapWorld(num_blocks=16, prefix_caching=False, draft_tokens=6, policy=StrictPriority())
    low = world.submit([7] * 6, 30, RequestTerms(priority=1))
    for _ in range(4):
        world.step()
    # One that needs the whole pool.
    world.submit([9] * 60, 4)
    world.run_until(num_swaps=1)
    request = world.scheduler._requests[low]
    assert len(request.host_blocks) == -(-request.num_swapped // 4) > 0
    world.finish()


def test_a_shared_beginning_is_moved_once():
    world = SwapWorld(num_blocks=16, policy=StrictPriority())
    low = RequestTerms(priority=1)
    world.submit([7] * 16 + [1], 12, low)
    for _ in range(4):
        world.step()
    world.submit([7] * 16 + [2], 12, low)
    for _ in range(4):
        world.step()
    # One that needs the whole pool makes both give way.
    world.submit([9] * 40, 24)
    world.run_until(num_swaps=2)
    world.step()
    world.step()
    # Four blocks of the beginning, and of each its own.
    held = world.scheduler.stats().host.num_held
    assert world.num_out == held <= 4 + 2 * 3
    world.finish()


def test_a_beginning_that_others_hold_on_to_does_not_come_back_twice():
    """What the pool still has of a swapped request is not copied back."""
    world = SwapWorld(num_blocks=12)
    first = world.submit([7] * 16 + [1], 24)
    for _ in range(4):
        world.step()
    world.submit([7] * 16 + [2], 24)
    world.run_until(num_swaps=1)
    assert first in world.specs
    world.finish()
    assert 0 < world.num_in < world.num_out


def test_what_ends_while_swapped_out_gives_its_host_blocks_back():
    world = SwapWorld(prefix_caching=False)
    requests = [world.submit([number] * 6, 20) for number in range(3)]
    world.run_until(num_swaps=1)
    assert world.scheduler.stats().host.num_held > 0
    for request in requests:
        if request in world.specs:
            world.cancel(request)
    for _ in range(5):
        world.step()
    world.is_clean()


def test_lost_shards_take_host_memory_with_them():
    world = SwapWorld(prefix_caching=False)
    for number in range(3):
        world.submit([number] * 6, 20)
    world.run_until(num_swaps=1)
    world.lose_shards()
    world.scheduler.check()
    assert world.scheduler.stats().host.num_held == 0
    world.finish()


def test_a_request_that_does_not_fit_into_host_memory_is_computed_anew():
    world = SwapWorld(num_host_blocks=1, prefix_caching=False)
    requests = [world.submit([number] * 6, 20) for number in range(3)]
    world.finish()
    assert world.num_out == 0
    assert sum(world.computed[request] for request in requests) > 3 * 25


def test_logprobs_of_a_prompt_that_were_not_told_yet_are_computed_anew():
    world = SwapWorld(num_blocks=40, prefix_caching=False, policy=StrictPriority())
    asks = world.submit([3] * 140, 4, RequestTerms(priority=1), prompt_logprobs=True)
    world.step()
    world.submit([4] * 100, 2)
    world.finish()
    # Two steps of 64 tokens were in vain.
    assert world.scheduler.stats().num_preemptions == 1
    assert world.computed[asks] == 128 + 143


@pytest.mark.parametrize(("block_move_s", "moves"), [(1.9, True), (2.1, False)])
def test_the_cheaper_of_moving_and_computing_is_chosen(block_move_s: float, moves: bool):
    """Blocks of 4 tokens: out and back take as long as computing them at 2 s for each block."""
    world = SwapWorld(token_s=1.0, block_move_s=block_move_s, prefix_caching=False)
    world.submit([1] * 8, 13)
    world.submit([2] * 8, 13)
    world.finish()
    assert (world.num_out > 0) == moves


def test_what_computing_again_takes_is_learned_from_steps() -> None:
    fit = CostFit()
    cost = FittedRecompute(fit)
    assert cost.recompute_s(1) == inf
    assert cost.recompute_s(0) == 0.0
    for number in range(50):
        tokens = 8 + 40 * (number % 5)
        fit.observe(StepWork(tokens, 0, 0, 0), 0.02 + 0.001 * tokens)
    # Without what each step takes for itself.
    assert cost.recompute_s(1000) == pytest.approx(1.0, rel=0.05)


def test_an_evicted_beginning_comes_back_from_host_memory():
    world = SwapWorld(num_blocks=8, keeps_evicted=True)
    prompt = [5] * 17
    world.submit(prompt, 2)
    world.finish()
    # Takes the whole pool.
    world.submit([6] * 30, 2)
    world.finish()
    again = world.submit(prompt, 2)
    world.finish()
    assert world.num_in == 4
    assert world.computed[again] == 17 + 1 - 16
    assert world.scheduler.stats().num_cached_tokens == 16


def test_what_is_cached_in_host_memory_gives_way_to_those_who_swap():
    world = SwapWorld(num_blocks=8, num_host_blocks=8, keeps_evicted=True)
    for number in range(6):
        world.submit([number] * 20, 4)
        world.finish()
    assert world.scheduler.stats().host.num_cached == 8
    for number in range(10, 13):
        world.submit([number] * 6, 20)
    world.finish()
    assert world.scheduler.stats().host.num_swaps > 0


def test_a_copy_that_no_chain_leads_to_does_not_stand_in_the_way():
    """Host memory for one block: what leads to it is gone for good."""
    world = SwapWorld(num_blocks=8, num_host_blocks=1, keeps_evicted=True)
    for _ in range(3):
        for number in range(3):
            world.submit([number] * 25, 2)
            world.finish()
    again = world.submit([2] * 25, 2)
    world.finish()
    # The pool still has what was computed last, all of it.
    assert world.computed[again] == 25 + 1 - 24


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["recompute", "swap", "mixed", "tier"])
def test_a_pool_of_a_fifth_of_the_demand_serves_everybody(
    policy: type[SchedulingPolicy], mode: str
):
    """Bit for bit, without a standstill and without a block left behind."""
    rng = random.Random(f"{policy.__name__} {mode}")
    world = SwapWorld(
        num_blocks=12,
        policy=policy(),
        num_host_blocks={"recompute": 0, "mixed": 9}.get(mode, 64),
        keeps_evicted=mode == "tier",
        depth=rng.choice([1, 2, 3]),
    )
    num_rounds = 0
    while world.num_steps < NUM_STEPS:
        num_rounds += 1
        # All at once ask for five times what the pool holds.
        world.load(20, rng)
        for request in rng.sample(sorted(world.specs), 3):
            world.step()
            if request in world.specs:
                world.cancel(request)
        if num_rounds % 10 == 0:
            world.lose_shards()
        world.finish()
    stats = world.scheduler.stats()
    print("FIGURE", policy.__name__, mode, world.num_steps, "steps", stats.num_preemptions,
          "preemptions", stats.host)  # fmt: skip
    assert stats.num_preemptions > 0
    assert (stats.host.num_swaps > 0) == (mode != "recompute")


# --- who gives way -----------------------------------------------------------------------


def request_of(order: int, tenant: str = "", rank: float = 0.0) -> RequestState:
    """Return a request of some tenant and class that runs."""
    spec = RequestSpec(
        request_id=RequestId(order), prompt_ids=[1], sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=1),
    )  # fmt: skip
    request = RequestState(spec, order, 0.0, RequestTerms(tenant))
    request.rank = rank
    return request


def chosen(policy: SchedulingPolicy, rows: list[RequestState], ease: dict[int, int]) -> int:
    """Return who gives way to an older request."""
    found = policy.victim(request_of(0, "c"), rows, rows, lambda each: ease.get(each.order, 0))
    assert found is not None
    return found.order


def test_within_a_class_who_loses_least_gives_way() -> None:
    worse, cheap, late = request_of(1, rank=1.0), request_of(2), request_of(3)
    policy = StrictPriority()
    assert chosen(policy, [worse, cheap, late], {2: 1}) == 1
    assert chosen(policy, [cheap, late], {2: 1}) == 2
    assert chosen(policy, [cheap, late], {}) == 3


def test_the_tenant_that_holds_most_gives_way_and_of_it_who_loses_least() -> None:
    policy = FairShare()
    rows = [request_of(1, "a"), request_of(2, "a"), request_of(3, "b")]
    for request in rows:
        request.blocks = [BlockId(request.order)]
        policy.push(request)
    assert chosen(policy, rows, {1: 1, 3: 2}) == 1
    assert chosen(policy, rows, {}) == 2


def test_a_row_whose_adapter_is_about_to_leave_gives_way_first() -> None:
    """It would have to, all the same, a little later."""
    seen: list[tuple[int, dict[int, int]]] = []

    class Spy(FirstComeFirstServed):
        def victim(
            self,
            request: RequestState,
            outranked: Sequence[RequestState],
            running: Collection[RequestState],
            ease: Callable[[RequestState], int],
        ) -> RequestState | None:
            found = super().victim(request, outranked, running, ease)
            assert found is not None
            seen.append((found.spec.adapter, {r.spec.adapter: ease(r) for r in outranked}))
            return found

    adapters = AdapterTable(max_resident=2, cycle_time_s=5.0)
    world = CoreWorld(Spy(), adapters=adapters, num_blocks=9)
    for adapter in (0, 1, 2):
        world.submit(ANY_TERMS, 4, 20, adapter=adapter)
    # Waits for a slot: after a cycle the adapter that came first makes room.
    world.submit(ANY_TERMS, 4, 2, adapter=3)
    world.run_until_idle()
    assert seen[0] == (1, {1: 2, 2: 0})
