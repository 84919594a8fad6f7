"""Adapters that may be to blame when the shards are lost: those that were being prepared."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.record import AdapterRecord, AdapterState


def is_preparing(record: AdapterRecord) -> bool:
    """Whether the shards are at work on an adapter."""
    return record.state is AdapterState.PREPARING


def blame_preparations(
    records: Iterable[AdapterRecord], most: int
) -> tuple[bool, list[AdapterHandle]]:
    """Note a loss; return whether an adapter was being prepared, and which was too often.

    That is ``most`` times one after the other: nobody pins or calls it any more, and whoever asks
    ends the requests that wait for it.
    """
    preparing = list(filter(is_preparing, records))
    for record in preparing:
        record.num_losses += 1
    blamed = [record for record in preparing if record.num_losses >= most]
    for record in blamed:
        record.num_losses, record.is_pinned, record.is_called = 0, False, False
    return bool(preparing), [record.handle for record in blamed]
