"""Adapters that are loaded before a request asks for them, where that costs others nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from lorax_contract.adapters import AdapterRef
from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.record import AdapterCapacity, AdapterRecord
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.directory import AdapterDirectory

logger = logging.getLogger(__name__)

# What is told beyond that is passed over.
_MAX_WAITING = 1024


class LoadingEngine(Protocol):
    """Has adapters on the shards."""

    async def load_adapter(self, handle: AdapterHandle, *, pin: bool = False) -> None:
        """Have an adapter on the shards; returns when it is, raises why it is not."""

    def is_adapter_resident(self, handle: AdapterHandle) -> bool:
        """Whether an adapter is on the shards, ready for requests."""

    def adapter_record(self, handle: AdapterHandle) -> AdapterRecord | None:
        """Return what the scheduler knows of an adapter; not to be changed."""

    def adapter_capacity(self) -> AdapterCapacity:
        """Return how much room there is for adapters, and how much of it is taken."""


class Preloader:
    """Loads adapters one after the other, so that those that requests wait for come between them.

    With no token, so only what everybody may use; into free slots, so nothing goes for one; and
    nothing of it is remembered beyond the server's end.

    Args:
        directory: finds adapters.
        engine: has them on the shards.
    """

    def __init__(self, directory: AdapterDirectory, engine: LoadingEngine) -> None:
        self._directory, self._engine = directory, engine
        # In the order in which they were told.
        self._waiting: dict[AdapterRef, None] = {}
        self._loading: asyncio.Task[None] | None = None

    def take(self, refs: Iterable[AdapterRef]) -> None:
        """Load these, too; the first ones first."""
        for ref in refs:
            if len(self._waiting) < _MAX_WAITING:
                self._waiting.setdefault(ref)
        if self._loading is None or self._loading.done():
            self._loading = asyncio.get_running_loop().create_task(self._load_all())

    async def close(self) -> None:
        """Load nothing any more."""
        self._waiting.clear()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    async def _load_all(self) -> None:
        while self._waiting:
            ref = next(iter(self._waiting))
            del self._waiting[ref]
            if not self._has_room(0):
                self._waiting.clear()
                return
            try:
                await self._load(ref)
            except Exception as error:  # noqa: BLE001 - a request for it says what is wrong, in its words
                logger.info("adapter %s is not loaded before it is asked for: %s", ref, error)

    async def _load(self, ref: AdapterRef) -> None:
        lease = await self._directory.acquire(AdapterSelection(refs=(ref,)))
        try:
            record = self._engine.adapter_record(lease.handle)
            nbytes = 0 if record is None else record.nbytes
            is_there = self._engine.is_adapter_resident(lease.handle)
            # Others may have come while it was fetched.
            if not is_there and self._has_room(nbytes):
                await self._engine.load_adapter(lease.handle)
        finally:
            lease.release()

    def _has_room(self, nbytes: int) -> bool:
        """Whether an adapter of so many bytes finds a slot and memory that nobody has."""
        room = self._engine.adapter_capacity()
        fits = room.max_bytes is None or room.bytes_held + nbytes <= room.max_bytes
        return fits and room.num_held < room.max_resident
