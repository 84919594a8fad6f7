"""How much a core has to do, as ingresses are told it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Protocol

from lorax_contract.errors import LoraxError
from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.record import AdapterState
from lorax_router.core.adapters.table import AdapterRecord
from lorax_router.fronts.core_facts import CoreLoad
from lorax_router.service.engine.port import EngineStats
from lorax_router.service.keys.meters import Meters

logger = logging.getLogger(__name__)

# How old what is said of host memory may be, and how many adapters are asked for.
_HOSTED_S = 3.0
_MAX_HOSTED = 512


class LoadedEngine(Protocol):
    """What is asked how much there is to do."""

    @property
    def has_shards(self) -> bool:
        """Whether there are shards; while others are waited for, requests wait, too."""

    def stats(self) -> EngineStats:
        """Return a snapshot."""

    def adapters_in_play(self) -> list[AdapterRecord]:
        """Return the adapters that are on the shards, come, go or are waited for."""

    def service_here(self) -> Mapping[str, float]:
        """Return what each tenant got so far."""

    def served_elsewhere(self, amounts: Mapping[str, float]) -> None:
        """Charge tenants what other cores gave them."""

    def queued_elsewhere(self, depths: Mapping[str, tuple[int, int]]) -> None:
        """Take what tenants have waiting at other cores."""


class KnownAdapters(Protocol):
    """What knows adapters by their keys, and where they lie."""

    @property
    def managed_digest(self) -> int:
        """What stands for all that was managed by hand."""

    def place_keys(self, handles: Iterable[AdapterHandle]) -> list[str]:
        """Return what requests for some adapters are sent by."""

    async def hosted_keys(self, most: int) -> list[str]:
        """Return the same of adapters that are in host memory and not on the device."""


class LoadTeller:
    """Says how much a core has to do now.

    Args:
        engine: what does it.
        adapters: what knows its adapters.
        meters: what tenants have taken of their quotas.
        is_open: whether new requests are taken.
        num_slots: adapters that fit on the device.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        adapters: KnownAdapters,
        meters: Meters,
        *,
        is_open: Callable[[], bool],
        num_slots: int,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.engine = engine
        self.meters = meters
        self._adapters = adapters
        self._is_open = is_open
        self._num_slots = num_slots
        self._clock = clock
        self._hosted: list[str] = []
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def now(self) -> CoreLoad:
        """Return how much there is to do; what lies in host memory is asked for when that is old."""
        self._ask_hosted()
        engine = self.engine
        stats = engine.stats()
        present = [
            record.handle for record in engine.adapters_in_play()
            if record.state in (AdapterState.RESIDENT, AdapterState.PREPARING)
        ]  # fmt: skip
        depths, keys = stats.queue_depths, self._adapters.place_keys(present)
        return CoreLoad(
            is_accepting=self._is_open() and engine.has_shards,
            # One that has several keys takes one slot.
            num_slots=self._num_slots + len(keys) - len(present),
            resident=keys,
            num_running=stats.num_running,
            num_queued=stats.num_waiting,
            num_queued_tokens=sum(each.num_tokens for each in depths.values()),
            kv_in_use=1.0 - stats.num_free_blocks / max(stats.num_blocks, 1),
            served={**engine.service_here()},
            taken=self.meters.taken(),
            hosted=self._hosted,
            queued={tenant: (*depth,) for tenant, depth in depths.items()},
            managed=self._adapters.managed_digest,
        )

    async def close(self) -> None:
        """Ask for nothing any more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    def _ask_hosted(self) -> None:
        is_asking = self._asking is not None and not self._asking.done()
        if is_asking or self._clock() - self._asked_at < _HOSTED_S:
            return
        self._asked_at = self._clock()
        self._asking = asyncio.get_running_loop().create_task(self._take_hosted())

    async def _take_hosted(self) -> None:
        try:
            self._hosted = await self._adapters.hosted_keys(_MAX_HOSTED)
        except LoraxError as error:
            # Without shards there is no host memory of theirs.
            logger.debug("host memory cannot be asked for: %s", error)
            self._hosted = []
