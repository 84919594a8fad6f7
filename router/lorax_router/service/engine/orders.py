"""Carries out the scheduler's orders for adapters on the prepare lane, beside the steps."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from lorax_contract.adapters import LoadReport
from lorax_contract.errors import GenerationError, LoraxError, ShardError
from lorax_contract.step import AdapterHandle, RequestId
from lorax_router.core.adapters.table import AdapterEvent, AdapterState
from lorax_router.core.scheduler import Scheduler

logger = logging.getLogger(__name__)

# A release that fails is tried again after these seconds, the last of which repeat.
_RELEASE_PAUSES_S = (0.2, 0.2, 1.0, 5.0, 30.0)


class OrderExecutor(Protocol):
    """Prepares and releases adapters on the shards by their handles."""

    async def prepare(self, handle: AdapterHandle) -> LoadReport:
        """Make an adapter ready on all ranks; raises LoraxError."""

    async def release(self, handle: AdapterHandle) -> None:
        """Free it on all ranks; raises LoraxError."""

    def no_numbers(self, handle: AdapterHandle) -> None:
        """A row with this adapter had logits that are no finite numbers."""

    def shards_lost(self) -> None:
        """Others took the place of the shards."""

    def numbers(self, handle: AdapterHandle) -> None:
        """A row with this adapter ended well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLoad:
    """How an adapter came to the shards last time; times of the engine's clock."""

    ordered_at: float
    ready_at: float
    report: LoadReport


class AdapterOrders:
    """One task per order; each ends in an event for the scheduler.

    Args:
        scheduler: whose orders these are.
        carrier: what carries them out.
        clock: the engine's.
        on_event: called after each event, with the requests that it ended and why.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        carrier: OrderExecutor,
        clock: Callable[[], float],
        on_event: Callable[[list[RequestId], LoraxError | None], None],
    ) -> None:
        self.loads: dict[AdapterHandle, AdapterLoad] = {}
        self._scheduler = scheduler
        self._carrier = carrier
        self._clock = clock
        self._on_event = on_event
        self._tasks: set[asyncio.Task[None]] = set()
        # Futures that wait for an adapter to be there, or to be gone for good.
        self._arrivals: dict[AdapterHandle, asyncio.Future[None]] = {}
        self._departures: dict[AdapterHandle, asyncio.Future[None]] = {}

    def carry_out(self) -> None:
        """Start what the scheduler ordered since the last call."""
        orders = self._scheduler.adapter_orders()
        for handle in orders.prepare:
            self._start(self._prepare(handle, orders.epoch))
        for handle in orders.release:
            self._start(self._release(handle, orders.epoch))

    def arrival(self, handle: AdapterHandle) -> asyncio.Future[None]:
        """Return a future that ends when the adapter is resident, or with why it is not."""
        if self._scheduler.adapters[handle].state is AdapterState.RESIDENT:
            there = asyncio.get_running_loop().create_future()
            there.set_result(None)
            return there
        return _shared(self._arrivals, handle)

    def departure(self, handle: AdapterHandle) -> asyncio.Future[None]:
        """Return a future that ends when a retired adapter is gone."""
        future = _shared(self._departures, handle)
        self._tell_departures()
        return future

    def started_anew(self) -> None:
        """Other shards took the place of those that all orders so far were for: these are void."""
        for task in self._tasks:
            task.cancel()
        self._carrier.shards_lost()
        self.loads.clear()
        self._tell_departures()
        for handle in list(self._arrivals):
            record = self._scheduler.adapters.find(handle)
            if record is None or record.wanted_at is None:
                error = GenerationError(
                    f"adapter {handle} is not prepared by the shards that are there now: they have no room for it, or "
                    "others were lost over it",
                    public="the adapter could not be loaded",
                )
                _fail(self._arrivals.pop(handle), error)

    def close(self, error: LoraxError) -> None:
        """Give up; whoever waits gets the error."""
        for task in self._tasks:
            task.cancel()
        for future in (*self._arrivals.values(), *self._departures.values()):
            _fail(future, error)

    def _start(self, order: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(order)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prepare(self, handle: AdapterHandle, epoch: int) -> None:
        ordered_at = self._clock()
        try:
            report = await self._carrier.prepare(handle)
        except Exception as error:  # noqa: BLE001 - it fails this adapter's requests alone
            self._failed(handle, error, epoch)
            return
        now = self._clock()
        self.loads[handle] = AdapterLoad(ordered_at=ordered_at, ready_at=now, report=report)
        self._scheduler.adapter_event(
            handle, AdapterEvent.PREPARED, now, epoch=epoch, nbytes=report.device_bytes
        )
        if (arrival := self._arrivals.pop(handle, None)) is not None and not arrival.done():
            arrival.set_result(None)
        self._on_event([], None)

    def _failed(self, handle: AdapterHandle, error: Exception, epoch: int) -> None:
        if isinstance(error, LoraxError):
            logger.warning("adapter %d could not be prepared: %s", handle, error)
        else:
            logger.error("adapter %d could not be prepared", handle, exc_info=error)
        shown = error if isinstance(error, LoraxError) else None
        if shown is None or isinstance(shown, ShardError):
            shown = GenerationError(str(error), public="the adapter could not be loaded")
        ended = self._scheduler.adapter_event(
            handle, AdapterEvent.FAILED, self._clock(), epoch=epoch
        )
        if (arrival := self._arrivals.pop(handle, None)) is not None:
            # Whoever loads it by hand may care whose fault it was.
            _fail(arrival, error if isinstance(error, LoraxError) else shown)
        self._tell_departures()
        self._on_event(ended, shown)

    async def _release(self, handle: AdapterHandle, epoch: int) -> None:
        """Have an adapter freed; until the shards say that it is, its slot and bytes are held."""
        pauses = itertools.chain(_RELEASE_PAUSES_S, itertools.repeat(_RELEASE_PAUSES_S[-1]))
        while True:
            try:
                await self._carrier.release(handle)
                break
            except Exception as error:  # noqa: BLE001 - whatever it was, it is still there
                # W14: nobody's request is to blame, and none may hear of it.
                pause_s = next(pauses)
                logger.error(
                    "adapter %d could not be released, its memory is held; trying again in %g s: %s",
                    handle, pause_s, error,
                )  # fmt: skip
                await asyncio.sleep(pause_s)
        self.loads.pop(handle, None)
        self._scheduler.adapter_event(handle, AdapterEvent.RELEASED, self._clock(), epoch=epoch)
        self._tell_departures()
        self._on_event([], None)

    def _tell_departures(self) -> None:
        gone = [each for each in self._departures if each not in self._scheduler.adapters]
        for handle in gone:
            future = self._departures.pop(handle)
            if not future.done():
                future.set_result(None)


def _fail(future: asyncio.Future[None], error: LoraxError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # that nobody waits any more is no news


def _shared(
    futures: dict[AdapterHandle, asyncio.Future[None]], handle: AdapterHandle
) -> asyncio.Future[None]:
    """Return the future of a handle that any number of callers may wait for, shielded."""
    future = futures.get(handle)
    if future is None:
        future = futures[handle] = asyncio.get_running_loop().create_future()
    return future
