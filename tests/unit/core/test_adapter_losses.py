"""What becomes of adapters when other shards take the place of those that were lost."""

from __future__ import annotations

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.table import AdapterTable


def test_nothing_is_called_for_that_pins_leave_no_memory_for() -> None:
    """It would be called for ever."""
    table = AdapterTable(max_resident=3, max_bytes=10)
    pinned, called = AdapterHandle(1), AdapterHandle(2)
    table.add(pinned, 3, pin=True)
    table.add(called, 3)
    table.want(called, 0.0)
    table.shards_lost(5)
    assert table[pinned].is_pinned and not table[called].is_called
    assert table.orders(1.0).prepare == [pinned]
