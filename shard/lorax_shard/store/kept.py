"""Leases that are taken in threads, for those who may be cancelled while they wait."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TypeVar

from lorax_shard.store.store import Lease

_Taken = TypeVar("_Taken", Lease, Lease | None)


async def kept(taking: asyncio.Future[_Taken]) -> _Taken:
    """Return what a thread takes; a lease that arrives after a cancellation is given back."""
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        taking.add_done_callback(_give_back)
        raise


def _give_back(taking: asyncio.Future[_Taken]) -> None:
    with contextlib.suppress(asyncio.CancelledError, Exception):
        lease = taking.result()
        if lease is not None:
            lease.release()
