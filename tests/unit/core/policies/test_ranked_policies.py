"""Policies of one rank per request: classes, expected lengths, LoRAX's rule."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tests.helpers.core_world import CoreWorld

from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies.lengths import OutputLengths
from lorax_router.core.policies.lorax import OldestHead
from lorax_router.core.policies.priority import SHARE_OF_BETTER, StrictPriority
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.policies.shortest import ShortestFirst
from lorax_router.core.request import RequestState, RequestTerms

HIGH, LOW = RequestTerms(priority=0), RequestTerms(priority=1)


def test_fcfs_admits_in_order_of_arrival() -> None:
    """Whatever the tenants, the classes and the adapters that are there."""
    world = CoreWorld(FirstComeFirstServed(), max_rows=1)
    numbers = [world.submit((HIGH, LOW)[each % 2], adapter=each % 3) for each in range(9)]
    world.step(2)
    world.run_until_idle()
    resident = [world.admitted[each] for each in numbers[3:]]
    assert resident == sorted(resident)


# --- classes ---------------------------------------------------------------------------


def test_a_better_class_takes_the_rows_of_a_worse_one_at_once() -> None:
    """Its first token comes as if nobody else were there, but for the step that runs."""
    world = CoreWorld(StrictPriority(), max_rows=2)
    for _ in range(10):
        world.submit(LOW, num_output=50)
    world.step(5)
    high = world.submit(HIGH)
    world.step(1)
    assert world.admitted[high] == 5.0
    world.run_until_idle()
    assert set(world.tokens.values()) == {50, 4}


def test_a_better_class_takes_blocks_too_and_only_as_many_as_it_needs() -> None:
    """The latest of the worst class gives way, one is enough."""
    world = CoreWorld(StrictPriority(), num_blocks=10, max_rows=8)
    for _ in range(3):
        world.submit(LOW, num_prompt=8, num_output=8)
    world.step(2)
    world.submit(HIGH, num_prompt=8, num_output=2)
    world.step(2)
    assert world.scheduler.stats().num_preemptions == 1
    world.run_until_idle()


def test_nobody_gives_way_in_vain() -> None:
    """A request that would not fit beside its own class takes nothing from worse ones."""
    world = CoreWorld(StrictPriority(), num_blocks=10, max_rows=8)
    world.submit(HIGH, num_prompt=24, num_output=4)
    world.step()
    world.submit(LOW, num_prompt=2, num_output=6)
    world.step()
    world.submit(HIGH, num_prompt=24, num_output=4)
    world.step()
    assert world.scheduler.stats().num_preemptions == 0
    world.run_until_idle()


def test_worse_classes_keep_a_share_and_their_order() -> None:
    """Under a flood of a better class one of SHARE_OF_BETTER + 1 admissions is theirs."""
    world = CoreWorld(StrictPriority(), max_rows=1)
    low = [world.submit(LOW, num_output=2) for _ in range(3)]
    for _ in range(200):
        world.submit(HIGH, num_output=2)
    world.run_until_idle()
    order = sorted(world.admitted, key=world.admitted.__getitem__)
    places = [order.index(each) for each in low]
    assert places == sorted(places)
    assert all(b - a == SHARE_OF_BETTER + 1 for a, b in pairwise([-1, *places]))


def test_a_request_let_in_by_that_share_is_never_made_to_give_way() -> None:
    """Else it would be admitted for nothing."""
    world = CoreWorld(StrictPriority(), max_rows=1)
    low = world.submit(LOW, num_output=100)
    for _ in range(2 * SHARE_OF_BETTER):
        world.submit(HIGH, num_output=1)
    world.step(SHARE_OF_BETTER + 1)
    assert low in world.admitted
    for _ in range(50):
        world.submit(HIGH, num_output=1)
    world.step(50)
    assert world.tokens[low] >= 50
    assert world.scheduler.stats().num_preemptions == 0
    world.run_until_idle()


def test_a_worse_class_that_does_not_fit_at_its_turn_keeps_nobody_waiting() -> None:
    """It takes the place of its own class, and the better one goes on."""
    world = CoreWorld(StrictPriority(), max_rows=6)
    for _ in range(8):
        world.submit(LOW, num_output=200)
    world.step()
    waits = []
    for _ in range(4 * SHARE_OF_BETTER):
        high, begun = world.submit(HIGH, num_output=1), world.now
        world.step(3)
        waits.append(world.admitted[high] - begun)
    assert max(waits) <= 1.0
    world.run_until_idle()


def test_a_worse_class_does_not_slip_past_what_does_not_fit() -> None:
    """What became free is kept for the better one."""
    world = CoreWorld(StrictPriority(), num_blocks=10, max_rows=8)
    world.submit(HIGH, num_prompt=16, num_output=8)
    world.step()
    large = world.submit(HIGH, num_prompt=24, num_output=4)
    small = world.submit(LOW, num_prompt=1, num_output=1)
    world.run_until_idle()
    assert 1.0 < world.admitted[large] <= world.admitted[small]


# --- expected lengths ---------------------------------------------------------------------


def test_the_shortest_goes_first_by_what_its_adapter_showed() -> None:
    """The clients all ask for the most; the adapters' habits tell them apart."""
    world = CoreWorld(ShortestFirst(ageing=0.0), max_rows=2)
    for _ in range(8):
        world.submit(LOW, num_output=2, adapter=1, max_new=100)
        world.submit(LOW, num_output=40, adapter=2, max_new=100)
    world.run_until_idle()
    talkers = [world.submit(LOW, num_output=40, adapter=2, max_new=100) for _ in range(6)]
    short = [world.submit(LOW, num_output=2, adapter=1, max_new=100) for _ in range(6)]
    world.run_until_idle()
    assert max(world.admitted[each] for each in short) <= min(world.ended[t] for t in talkers)
    assert sum(world.admitted[t] > min(world.admitted[s] for s in short) for t in talkers) >= 4


def test_ageing_bounds_how_often_a_long_one_is_overtaken() -> None:
    """After its extra work divided by the ageing nobody who comes goes before it."""
    world = CoreWorld(ShortestFirst(ageing=10.0), max_rows=1)
    world.submit(LOW, num_output=2)
    long = world.submit(LOW, num_output=100)
    for _ in range(60):
        world.submit(LOW, num_output=2)
        world.step(2)
    # 2 * 98 weighted tokens more than the others, made up for in 19.6 seconds.
    assert long in world.admitted
    assert world.admitted[long] <= 19.6 + 2 * 2 + (19.6 / 2) * 2
    world.run_until_idle()


class TestOutputLengths:
    """The predictor alone."""

    def test_it_believes_the_most_until_it_has_seen_some(self) -> None:
        """Nothing is known of a first request."""
        assert OutputLengths().predict(AdapterHandle(1), 77) == 77.0

    @pytest.mark.parametrize("length", [1, 3, 60, 5000])
    def test_it_learns_and_forgets(self, length: int) -> None:
        """Within a fifth of what an adapter does; a new habit wins in the end."""
        lengths = OutputLengths()
        for _ in range(20):
            lengths.observe(AdapterHandle(1), length)
        assert lengths.predict(AdapterHandle(1), 10**6) == pytest.approx(length, rel=0.2)
        for _ in range(60):
            lengths.observe(AdapterHandle(1), 300)
        assert lengths.predict(AdapterHandle(1), 10**6) == pytest.approx(300, rel=0.2)

    def test_an_adapter_never_seen_is_taken_for_the_average_one(self) -> None:
        """And nothing is expected to be longer than its limit."""
        lengths = OutputLengths()
        for _ in range(10):
            lengths.observe(AdapterHandle(1), 64)
        assert lengths.predict(AdapterHandle(2), 1000) == pytest.approx(64, rel=0.2)
        assert lengths.predict(AdapterHandle(2), 10) == 10.0


# --- LoRAX's rule ---------------------------------------------------------------------------


def test_lorax_keeps_what_a_request_may_need_and_stops_at_one_that_does_not_fit() -> None:
    """Its queue's head blocks all others: what the other policies do not do."""
    adapters = AdapterTable(max_resident=4)
    world = CoreWorld(OldestHead(adapters), adapters=adapters, num_blocks=10)
    first = world.submit(HIGH, num_prompt=4, num_output=2, max_new=25)
    large = world.submit(HIGH, num_prompt=20, num_output=2)
    small = world.submit(HIGH, num_prompt=1, num_output=1)
    world.run_until_idle()
    assert world.ended[first] <= world.admitted[large] <= world.admitted[small]
    assert world.scheduler.stats().num_preemptions == 0


def test_lorax_prefers_adapters_within_their_cycle_time() -> None:
    """One that came lately goes before an older head of one that has been there for long."""
    adapters = AdapterTable(max_resident=2, cycle_time_s=10.0)
    world = CoreWorld(OldestHead(adapters), adapters=adapters, max_rows=1)
    world.submit(HIGH, num_output=30, adapter=1)
    old = world.submit(HIGH, num_output=2, adapter=1)
    world.step(25)
    young = world.submit(HIGH, num_output=2, adapter=2)
    world.run_until_idle()
    assert world.admitted[young] < world.admitted[old]


def test_classes_stay_in_order_when_worse_ones_are_left_out_of_a_round() -> None:
    """What is left of a round is named by rank, wherever the others stood in its heap."""
    policy = StrictPriority()
    worse = iter(range(100, 115))
    # None is one of a worse class.
    places = [3, None, 1, None, 7, 6, 4, None, None, None, 5, 2, None, None, None]
    for adapter, place in enumerate(places):
        order = next(worse) if place is None else place
        spec = RequestSpec(
            request_id=RequestId(order), prompt_ids=[1], sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=1), adapter=AdapterHandle(adapter),
        )  # fmt: skip
        policy.push(RequestState(spec, order, 0.0, LOW if place is None else HIGH))
    policy.start_round(0.0, [AdapterHandle(adapter) for adapter in range(len(places))])
    named = []
    while (request := policy.head()) is not None:
        named.append(request.order)
        policy.deferred(request)
    assert named == [1, 2, 3, 4, 5, 6, 7]
