"""What a request's adapter is, found at once where it is known, else waited for."""

from __future__ import annotations

import asyncio

from lorax_contract.adapters import FetchedAdapter
from lorax_contract.errors import ShuttingDownError
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.directory import AdapterDirectory, AdapterLease
from lorax_router.service.adapters.tokens import TenantTokens
from lorax_router.service.callers import Caller
from lorax_router.service.keys.meters import TenantMeter
from lorax_router.service.metrics.recorder import Metrics

Known = list[FetchedAdapter] | None


class AdapterSeeker:
    """Finds the adapters of requests.

    Args:
        directory: has them.
        tokens: which of them opened private adapters.
        metrics: counts who waits.
    """

    def __init__(self, directory: AdapterDirectory, tokens: TenantTokens, metrics: Metrics) -> None:
        self._directory = directory
        self._tokens = tokens
        self._metrics = metrics
        # Of requests that wait for their adapter: ends the wait.
        self._waiting: set[asyncio.Timeout] = set()

    def known(self, selection: AdapterSelection) -> Known:
        """Return the answers for the names of an adapter if nobody has to be asked, else None."""
        return self._directory.known(selection)

    def is_resident(self, selection: AdapterSelection, known: Known) -> bool:
        """Whether a request finds on the shards what ``known`` found."""
        return self._directory.is_resident(selection, known)

    def take(
        self, caller: Caller, selection: AdapterSelection, known: Known
    ) -> AdapterLease | None:
        """Return a hold on what ``known`` found; None: ``find`` has to wait for something.

        Raises as that does.
        """
        lease = self._directory.acquire_known(selection, known)
        return lease and self._noted(caller, selection, lease)

    async def find(
        self, caller: Caller, selection: AdapterSelection, meter: TenantMeter
    ) -> AdapterLease:
        """Return a hold on an adapter; raises what ``AdapterDirectory.acquire`` does.

        ShuttingDownError once the server shuts down.
        """
        try:
            with self._metrics.resolving():
                async with asyncio.timeout(None) as waiting:
                    self._waiting.add(waiting)
                    lease = await self._directory.acquire(selection, meter=meter)
        except TimeoutError:
            if not waiting.expired():
                raise
            raise ShuttingDownError from None
        finally:
            self._waiting.discard(waiting)
        return self._noted(caller, selection, lease)

    def end_waits(self) -> None:
        """Tell requests that still wait for their adapter that the server shuts down."""
        for waiting in self._waiting:
            waiting.reschedule(asyncio.get_running_loop().time())

    def _noted(
        self, caller: Caller, selection: AdapterSelection, lease: AdapterLease
    ) -> AdapterLease:
        if lease.is_private:
            self._tokens.opened(caller, selection.token)
        return lease
