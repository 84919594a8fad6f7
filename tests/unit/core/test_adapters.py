"""The adapter table: transitions, budgets, eviction, and turns for those who wait."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_contract.errors import ValidationError
from lorax_contract.step import BASE_ADAPTER, AdapterHandle
from lorax_router.core.adapters.table import (
    AdapterEvent,
    AdapterState,
    AdapterTable,
    IllegalTransitionError,
    Orders,
)

CYCLE_S = 2.0


def handle(number: int) -> AdapterHandle:
    """Return a handle."""
    return AdapterHandle(number)


def make_table(num: int, *, slots: int = 2, sizes: dict[int, int] | None = None) -> AdapterTable:
    """Return a table that knows adapters 1..num, of one byte each unless ``sizes`` says so."""
    table = AdapterTable(max_resident=slots, max_bytes=10, cycle_time_s=CYCLE_S)
    for number in range(1, num + 1):
        table.add(handle(number), (sizes or {}).get(number, 1))
    return table


def carry_out(table: AdapterTable, now: float) -> Orders:
    """Take the orders and let all of them succeed at once, until none are left."""
    done = Orders()
    while True:
        orders = table.orders(now)
        if not (orders.prepare or orders.release):
            return done
        for each in orders.prepare:
            table.event(each, AdapterEvent.PREPARED, now)
        for each in orders.release:
            table.event(each, AdapterEvent.RELEASED, now)
        done.prepare += orders.prepare
        done.release += orders.release


def request(table: AdapterTable, number: int, now: float) -> None:
    """Let a request wait for an adapter, have it prepared, and admit it if that is allowed."""
    table.waits(handle(number), now)
    carry_out(table, now)
    if handle(number) in table.admitting():
        table.runs(handle(number), now)


def test_the_base_model_is_always_there() -> None:
    """It needs no slot and is never counted."""
    table = make_table(0)
    table.waits(BASE_ADAPTER, 0.0)
    assert BASE_ADAPTER in table.admitting()
    table.runs(BASE_ADAPTER, 0.0)
    table.leaves(BASE_ADAPTER, was_running=True)
    assert table.orders(0.0) == Orders()


def test_an_adapter_is_admitted_only_once_it_is_resident() -> None:
    """Wanted, ordered, prepared: then requests may enter."""
    table = make_table(1)
    table.waits(handle(1), 0.0)
    assert table.orders(0.0).prepare == [1]
    assert table.orders(0.0) == Orders()
    assert handle(1) not in table.admitting()
    table.event(handle(1), AdapterEvent.PREPARED, 1.0)
    assert handle(1) in table.admitting()


def test_w13_a_failed_preparation_gives_its_slot_and_bytes_back() -> None:
    """Retrying a broken adapter for ever leaks nothing."""
    table = make_table(3, slots=2, sizes={1: 10})
    for now in range(50):
        table.waits(handle(1), float(now))
        assert table.orders(float(now)).prepare == [1]
        table.event(handle(1), AdapterEvent.FAILED, float(now))
        table.leaves(handle(1), was_running=False)
        assert table.orders(float(now)) == Orders(release=[handle(1)])
        assert table.capacity().bytes_held == 10
        table.event(handle(1), AdapterEvent.RELEASED, float(now))
    request(table, 2, 60.0)
    request(table, 3, 60.0)
    assert handle(2) in table.admitting() and (handle(3) in table.admitting())


def test_memory_being_freed_is_not_promised_twice() -> None:
    """A slot is free again only when its release is booked."""
    table = make_table(3, slots=1)
    request(table, 1, 0.0)
    table.leaves(handle(1), was_running=True)
    table.waits(handle(2), 1.0)
    assert table.orders(1.0) == Orders(release=[handle(1)])
    assert table.orders(1.0) == Orders()
    table.event(handle(1), AdapterEvent.RELEASED, 1.5)
    assert table.orders(1.5) == Orders(prepare=[handle(2)])


def test_the_least_worthy_idle_adapter_is_evicted() -> None:
    """Often used and dear ones stay; a big one that was used once goes."""
    table = make_table(4, slots=3, sizes={2: 5})
    for number in (1, 2, 3):
        request(table, number, 0.0)
        table.leaves(handle(number), was_running=True)
    for number in (1, 3):
        request(table, number, 1.0)
        table.leaves(handle(number), was_running=True)
    table.waits(handle(4), 2.0)
    assert table.orders(2.0).release == [2]


def test_w9_one_that_does_not_fit_does_not_block_those_behind_it() -> None:
    """While a big adapter waits for room, a small one uses what it does not need."""
    table = make_table(4, slots=4, sizes={1: 6, 2: 8, 3: 1, 4: 2})
    request(table, 1, 0.0)
    table.waits(handle(2), 0.0)
    table.waits(handle(3), 0.1)
    table.waits(handle(4), 0.2)
    # 6 bytes are in use, the second needs 8, and it is not known yet who makes room for it.
    assert table.orders(0.3) == Orders()
    # The first makes room: beside the 8 there is room for the third, and none for the fourth.
    assert table.orders(CYCLE_S) == Orders(prepare=[handle(3)])
    assert handle(1) not in table.admitting()
    table.event(handle(3), AdapterEvent.PREPARED, CYCLE_S)
    table.leaves(handle(1), was_running=True)
    done = carry_out(table, CYCLE_S + 0.1)
    assert (done.release, done.prepare) == ([1], [2])


def test_w17_an_adapter_waits_at_most_three_cycles_while_all_others_stay_busy() -> None:
    """The longest resident is drained, then its rows give way, and the slot changes hands."""
    table = make_table(3, slots=2)
    request(table, 1, 0.0)
    request(table, 2, 0.5)
    table.progresses(handle(1), 0.5)
    request(table, 3, 1.0)
    assert handle(3) not in table.admitting()
    carry_out(table, 1.0 + CYCLE_S)
    assert handle(1) not in table.admitting()  # drained
    assert handle(2) in table.admitting()
    assert table.overdue(1.0 + 1.5 * CYCLE_S) == []
    assert table.overdue(1.0 + 2 * CYCLE_S) == [1]
    table.returns(handle(1), 1.0 + 2 * CYCLE_S)  # the scheduler preempts its row
    done = carry_out(table, 1.0 + 2 * CYCLE_S)
    assert (done.release, done.prepare) == ([1], [3])
    assert handle(3) in table.admitting()
    assert table[handle(1)].wanted_at == 1.0 + 2 * CYCLE_S  # at the end of the line


def test_a_turn_lasts_until_it_brought_somebody_further() -> None:
    """A prompt that takes longer than a turn would be computed again in each, for ever."""
    table = make_table(2, slots=1)
    request(table, 1, 0.0)
    table.waits(handle(2), 0.0)
    table.orders(CYCLE_S)
    assert handle(1) not in table.admitting()  # drained
    assert table.overdue(10 * CYCLE_S) == []
    table.progresses(handle(1), 10 * CYCLE_S)
    table.progresses(handle(1), 10.5 * CYCLE_S)
    assert table.overdue(10.9 * CYCLE_S) == []
    assert table.overdue(11 * CYCLE_S) == [1]
    # The next turn begins anew.
    table.returns(handle(1), 11 * CYCLE_S)
    carry_out(table, 11 * CYCLE_S)
    table.leaves(handle(2), was_running=False)
    carry_out(table, 11 * CYCLE_S)
    assert handle(1) in table.admitting()
    assert table[handle(1)].progressed_at is None


def test_a_drained_adapter_goes_on_when_nobody_waits_any_more() -> None:
    """The client that it was drained for has left."""
    table = make_table(2, slots=1)
    request(table, 1, 0.0)
    table.waits(handle(2), 0.0)
    table.orders(CYCLE_S)
    assert handle(1) not in table.admitting()
    table.leaves(handle(2), was_running=False)
    table.orders(CYCLE_S + 1)
    assert handle(1) in table.admitting()


def test_pinned_adapters_are_prepared_unasked_and_never_give_way() -> None:
    """And they never take the last slot."""
    table = make_table(3, slots=2)
    table.pin(handle(1))
    assert table.orders(0.0).prepare == [1]
    table.event(handle(1), AdapterEvent.PREPARED, 0.0)
    with pytest.raises(ValidationError, match="one must stay free"):
        table.pin(handle(2))
    request(table, 2, 0.0)
    table.waits(handle(3), 0.0)
    carry_out(table, 10.0)
    assert handle(1) in table.admitting() and handle(2) not in table.admitting()


def test_an_adapter_larger_than_the_budget_is_refused_in_words() -> None:
    """It could never be resident."""
    with pytest.raises(ValidationError, match="--adapter-memory-fraction"):
        make_table(1, sizes={1: 11})


def test_illegal_events_raise() -> None:
    """The table never guesses."""
    table = make_table(1)
    for event in (AdapterEvent.PREPARED, AdapterEvent.RELEASED, AdapterEvent.EVICT):
        with pytest.raises(IllegalTransitionError, match="adapter 1 is absent"):
            table.event(handle(1), event, 0.0)


def test_after_a_loss_of_the_shards_everything_in_demand_is_prepared_again() -> None:
    """Nothing is resident, nothing is held, running requests want their adapters back."""
    table = make_table(2, slots=2)
    request(table, 1, 0.0)
    table.shards_lost(10)
    table.returns(handle(1), 1.0)
    assert table.orders(1.0).prepare == [1]


def test_with_one_slot_nothing_can_be_pinned() -> None:
    """It would be the last one for everybody else."""
    table = make_table(1, slots=1)
    with pytest.raises(ValidationError, match="--max-active-adapters"):
        table.pin(handle(1))
    assert not table[handle(1)].is_pinned
    assert table.orders(0.0) == Orders()


def test_pins_that_do_not_fit_together_are_refused() -> None:
    """The second would wait for the first for ever."""
    table = make_table(3, slots=4, sizes={1: 6, 2: 6})
    table.pin(handle(1))
    carry_out(table, 0.0)
    with pytest.raises(ValidationError, match="6 bytes and pinned ones would leave 0 of 10"):
        table.pin(handle(2))
    table.unpin(handle(1))
    table.pin(handle(2))
    assert carry_out(table, 1.0) == Orders(prepare=[handle(2)], release=[handle(1)])


def test_a_pin_beside_which_an_adapter_in_use_never_fits_is_refused() -> None:
    """Its requests would wait for ever."""
    table = make_table(2, slots=4, sizes={1: 6, 2: 6})
    table.waits(handle(2), 0.0)
    with pytest.raises(ValidationError, match="in use"):
        table.pin(handle(1))
    table.leaves(handle(2), was_running=False)
    table.pin(handle(1))


def test_requests_for_an_adapter_that_pins_keep_out_are_refused_wherever_it_stands() -> None:
    """Resident, being freed or absent: it would have to come back and could not."""
    table = make_table(2, slots=4, sizes={1: 6, 2: 6})
    request(table, 2, 0.0)
    table.leaves(handle(2), was_running=True)
    table.check_possible(handle(2))
    table.pin(handle(1))
    for _ in range(2):
        with pytest.raises(ValidationError, match="pinned adapters leave 4 of 10"):
            table.check_possible(handle(2))
        table.check_possible(handle(1))
        carry_out(table, 1.0)
    table.unpin(handle(1))
    table.check_possible(handle(2))


def test_one_that_is_called_is_prepared_without_a_request() -> None:
    """And stays called when a request for it comes and leaves."""
    table = make_table(2, slots=1)
    request(table, 1, 0.0)
    table.want(handle(2), 1.0)
    table.waits(handle(2), 2.0)
    table.leaves(handle(2), was_running=False)
    table.leaves(handle(1), was_running=True)
    assert carry_out(table, 3.0) == Orders(prepare=[handle(2)], release=[handle(1)])
    assert not table[handle(2)].is_called
    table.want(handle(2), 4.0)  # it is there already
    assert not table[handle(2)].is_called


def test_one_that_is_called_while_it_is_being_freed_comes_back() -> None:
    """The selection is not forgotten when the release is booked, and counts from when it came."""
    table = make_table(3, slots=1)
    request(table, 1, 0.0)
    table.leaves(handle(1), was_running=True)
    table.waits(handle(2), 1.0)
    assert table.orders(1.0).release == [1]
    table.want(handle(1), 1.5)
    table.event(handle(1), AdapterEvent.RELEASED, 2.0)
    assert table[handle(1)].wanted_at == 1.5
    assert table.orders(2.0).prepare == [2]
    table.event(handle(2), AdapterEvent.PREPARED, 2.0)
    table.leaves(handle(2), was_running=False)
    assert carry_out(table, 2.5).prepare == [1]


def test_one_that_is_called_and_fails_is_not_tried_for_ever() -> None:
    """Whoever called hears of it."""
    table = make_table(1)
    table.want(handle(1), 0.0)
    assert table.orders(0.0).prepare == [1]
    table.event(handle(1), AdapterEvent.FAILED, 0.0)
    assert carry_out(table, 1.0) == Orders(release=[handle(1)])
    assert table.orders(2.0) == Orders()


def test_a_retired_adapter_serves_those_who_asked_then_leaves_with_its_memory() -> None:
    """Its record goes when its release is booked."""
    table = make_table(1)
    table.pin(handle(1))
    request(table, 1, 0.0)
    table.waits(handle(1), 0.0)
    table.retire(handle(1))
    assert handle(1) in table.admitting()
    table.runs(handle(1), 1.0)
    table.leaves(handle(1), was_running=True)
    assert carry_out(table, 1.0) == Orders()
    table.leaves(handle(1), was_running=True)
    assert table.orders(2.0).release == [1]
    assert handle(1) in table
    table.event(handle(1), AdapterEvent.RELEASED, 2.0)
    assert handle(1) not in table
    assert (table.capacity().num_held, table.capacity().bytes_held) == (0, 0)


@pytest.mark.parametrize("event", [AdapterEvent.PREPARED, AdapterEvent.FAILED])
def test_one_that_retires_while_it_is_prepared_leaves_too(event: AdapterEvent) -> None:
    """Whether it succeeds or not."""
    table = make_table(1)
    table.want(handle(1), 0.0)
    table.orders(0.0)
    table.retire(handle(1))
    table.event(handle(1), event, 1.0)
    carry_out(table, 1.0)
    assert handle(1) not in table


def test_an_absent_adapter_retires_at_once_also_when_it_was_called_or_pinned() -> None:
    """Nothing is left that could be ordered."""
    table = make_table(3)
    table.want(handle(1), 0.0)
    table.pin(handle(2))
    for number in (1, 2, 3):
        table.retire(handle(number))
        assert handle(number) not in table
    assert table.orders(1.0) == Orders()


def test_what_is_measured_replaces_what_was_announced() -> None:
    """Memory that turns out not to be needed is there for others."""
    table = make_table(2, slots=4, sizes={1: 9, 2: 4})
    table.waits(handle(1), 0.0)
    table.orders(0.0)
    table.measured(handle(1), 6)
    table.event(handle(1), AdapterEvent.PREPARED, 0.0)
    table.runs(handle(1), 0.0)
    assert table.capacity().bytes_held == 6
    request(table, 2, 1.0)
    assert handle(2) in table.admitting()
    assert table.capacity().bytes_held == 10
    table.check()


def num_calls(function: Callable[[], object]) -> int:
    """Return how many functions a function calls, all told."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("is_late", [False, True])
def test_a_decision_costs_what_there_are_slots_for_and_not_what_waits_or_is_known(
    is_late: bool,
) -> None:
    def cost(num_waiting: int, num_known: int) -> int:
        slots = 20
        table = AdapterTable(max_resident=slots, max_bytes=slots, cycle_time_s=CYCLE_S)
        for number in range(1, num_known + 1):
            table.add(handle(number), 1)
        for number in range(1, slots + 1):
            request(table, number, 0.0)
        for number in range(slots + 1, slots + num_waiting + 1):
            table.waits(handle(number), 1.0)
        now = 1.0 + CYCLE_S * is_late
        table.orders(now)
        return num_calls(lambda: (table.orders(now), table.overdue(now)))

    least = cost(1, 30)
    assert cost(50, 100) <= least + 100
    assert cost(1000, 5000) <= least + 100


NUMBERS = range(1, 6)


class World:
    """Five adapters, their demand, and orders that take time and sometimes fail."""

    def __init__(self, slots: int) -> None:
        self.table = make_table(5, slots=slots, sizes={4: 4, 5: 7})
        self.slots = slots
        self.waiting = dict.fromkeys(NUMBERS, 0)
        self.running = dict.fromkeys(NUMBERS, 0)
        self.busy: list[tuple[AdapterHandle, AdapterEvent]] = []
        self.now = 0.0

    def act(self, action: int, number: int) -> None:
        """Do one of the things that can happen, if it can happen now."""
        if action == 0:
            self.table.waits(handle(number), self.now)
            self.waiting[number] += 1
        elif action == 1:
            self.admit(number)
        elif action == 2 and self.running[number]:
            self.table.leaves(handle(number), was_running=True)
            self.running[number] -= 1
        elif action == 3 and self.waiting[number]:
            self.table.leaves(handle(number), was_running=False)
            self.waiting[number] -= 1
        elif action > 3:
            self.settle(number)

    def admit(self, number: int) -> bool:
        """Let a waiting request run if its adapter admits it."""
        if not self.waiting[number] or handle(number) not in self.table.admitting():
            return False
        self.table.runs(handle(number), self.now)
        self.table.progresses(handle(number), self.now)
        self.waiting[number] -= 1
        self.running[number] += 1
        return True

    def settle(self, index: int) -> None:
        """An order comes to its end; every seventh preparation fails."""
        if not self.busy:
            return
        each, event = self.busy.pop(index % len(self.busy))
        if event is AdapterEvent.PREPARED and index % 7 == 0:
            event = AdapterEvent.FAILED
        self.table.event(each, event, self.now)

    def turn(self) -> None:
        """Take orders, preempt who is overdue, and check the budgets."""
        self.now += 0.5
        orders = self.table.orders(self.now)
        self.busy += [(each, AdapterEvent.PREPARED) for each in orders.prepare]
        self.busy += [(each, AdapterEvent.RELEASED) for each in orders.release]
        for each in self.table.overdue(self.now):
            for _ in range(self.running[each]):
                self.table.returns(each, self.now)
            self.waiting[each] += self.running[each]
            self.running[each] = 0
        records = [self.table[handle(number)] for number in NUMBERS]
        held = [each for each in records if each.state is not AdapterState.ABSENT]
        self.table.check()
        assert len(held) <= self.slots
        assert sum(each.nbytes for each in held) <= 10


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    slots=st.integers(1, 3),
    actions=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=40, max_size=120),
)
def test_in_any_order_budgets_hold_and_everybody_gets_a_turn(
    slots: int, actions: list[tuple[int, int]]
) -> None:
    """Random demand; in the end every waiting adapter runs though nobody ever leaves."""
    world = World(slots)
    for action, number in actions:
        world.act(action, number)
        world.turn()
    wanted = {number for number in NUMBERS if world.waiting[number]}
    for _ in range(400):
        world.turn()
        while world.busy:
            world.settle(1)
        wanted -= {number for number in wanted if world.admit(number)}
    assert not wanted
