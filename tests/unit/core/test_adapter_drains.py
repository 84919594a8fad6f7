"""Who is drained for an adapter that waits: asked of the one who decides."""

from __future__ import annotations

from itertools import pairwise

from tests.helpers.core_world import CoreWorld

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.table import AdapterEvent, AdapterTable
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.request import RequestTerms

CYCLE_S = 2.0


def test_whoever_decides_says_which_adapter_is_drained() -> None:
    """Of those resident for a cycle, once the one that waits has waited for a cycle."""
    table = AdapterTable(max_resident=2, cycle_time_s=CYCLE_S)
    asked = []

    def second(record, candidates, held, *, has_waited):  # type: ignore[no-untyped-def]
        asked.append((record.handle, [each.handle for each in candidates], len(held), has_waited))
        return candidates[1] if has_waited else None

    for each in (1, 2):
        table.add(AdapterHandle(each), 1)
        table.waits(AdapterHandle(each), 0.0)
        table.orders(0.0, drain=second)
        table.event(AdapterHandle(each), AdapterEvent.PREPARED, 0.0)
        table.runs(AdapterHandle(each), 0.0)
    table.add(AdapterHandle(3), 1)
    table.waits(AdapterHandle(3), 0.0)
    table.orders(CYCLE_S / 2, drain=second)
    assert asked == [(3, [], 2, False)]
    table.orders(CYCLE_S, drain=second)
    assert asked[1:] == [(3, [1, 2], 2, True)]
    assert table[AdapterHandle(2)].drained_at == CYCLE_S
    assert table[AdapterHandle(1)].drained_at is None


def test_whoever_is_named_before_the_cycle_is_over_gives_its_slot_at_once() -> None:
    """Its rows are overdue in the same moment."""
    table = AdapterTable(max_resident=1, cycle_time_s=CYCLE_S)
    for each in (1, 2):
        table.add(AdapterHandle(each), 1)
    table.waits(AdapterHandle(1), 0.0)
    table.orders(0.0)
    table.event(AdapterHandle(1), AdapterEvent.PREPARED, 0.0)
    table.runs(AdapterHandle(1), 0.0)
    table.progresses(AdapterHandle(1), 0.0)
    now = CYCLE_S + 1.0
    table.waits(AdapterHandle(2), now)
    table.orders(now, drain=lambda record, candidates, held, *, has_waited: candidates[0])
    assert table.overdue(now) == [1]


def test_room_that_an_idle_adapter_makes_is_kept_for_whoever_it_is_made_for() -> None:
    """Who comes behind takes what is free and not needed, while the idle one is being freed."""
    table = AdapterTable(max_resident=3, max_bytes=10, cycle_time_s=CYCLE_S)
    for each, nbytes in ((1, 6), (2, 8), (3, 2), (4, 1)):
        table.add(AdapterHandle(each), nbytes)
    table.want(AdapterHandle(1), 0.0)
    assert table.orders(0.0).prepare == [1]
    table.event(AdapterHandle(1), AdapterEvent.PREPARED, 0.0)
    for each in (2, 3, 4):
        table.waits(AdapterHandle(each), 1.0)
    # 4 bytes are free. The second will need 8 of 10, so that two are left, and none after that.
    orders = table.orders(1.0)
    assert (orders.release, orders.prepare) == ([1], [3])
    table.event(AdapterHandle(1), AdapterEvent.RELEASED, 1.5)
    assert table.orders(1.5).prepare == [2]
    table.check()


def test_rows_of_a_turn_that_is_over_stay_longer_where_much_was_lost_to_turns() -> None:
    """A drained adapter's rows go after a cycle while that costs little, else after four."""
    world = CoreWorld(
        FirstComeFirstServed(), adapters=AdapterTable(max_resident=1, cycle_time_s=4.0),
        max_step_tokens=256, num_blocks=400,
    )  # fmt: skip
    for adapter in (1, 2):
        world.submit(RequestTerms("a"), num_prompt=100, num_output=300, adapter=adapter)
    ends = []
    while len(ends) < 6:
        before = world.scheduler.stats().num_preemptions
        world.step()
        if world.scheduler.stats().num_preemptions > before:
            ends.append(world.now)
    turns = [after - before for before, after in pairwise(ends)]
    assert turns[0] < 12
    assert all(16 <= each <= 24 for each in turns[1:])
