"""Has all replicas have what was managed by hand, those that are attached later too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from lorax_contract.errors import LoraxError
from lorax_ingress.managed import ManagedBook
from lorax_router.fronts.core_facts import CoreFacts
from lorax_router.service.adapters.managed import ManagedAdapters, TakenBack

_NOTHING, _NOTHING_GONE = ManagedAdapters(), TakenBack()

logger = logging.getLogger(__name__)


class ManagedCalls(Protocol):
    """Says what was managed by hand at a replica."""

    async def managed(self, elsewhere: ManagedAdapters, gone: TakenBack) -> ManagedAdapters:
        """Return it; the replica takes back what is gone and takes over what was elsewhere.

        Raises LoraxError.
        """


class ManagedReplica(Protocol):
    """One server that is attached."""

    name: str

    @property
    def managing(self) -> ManagedCalls:
        """What says there what was managed by hand."""

    @property
    def facts(self) -> CoreFacts | None:
        """What it serves; None: it is gone."""


class ManagedExchange:
    """Owns the book of what was managed; used in one event loop."""

    def __init__(self) -> None:
        self.book = ManagedBook()
        self._telling: set[asyncio.Task[None]] = set()

    def attached(self, replica: ManagedReplica) -> None:
        """Tell a replica, before anything is asked of it, what the others have."""
        if _answers(replica):
            task = asyncio.get_running_loop().create_task(self._tell(replica))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, replica: ManagedReplica) -> None:
        told = await _asked(replica, self.book.all(), self.book.gone_for(replica.name))
        if told is not None:
            self.book.told(told)

    @asynccontextmanager
    async def noting(self, replicas: Mapping[str, ManagedReplica]) -> AsyncIterator[None]:
        """Take note of what a call to all replicas changes, by what one of them says before and after.

        Those that were attached meanwhile are told of it.
        """
        witness = next((each for each in replicas.values() if _answers(each)), None)
        before = None if witness is None else await _asked(witness)
        present = set(replicas)
        yield
        after = None if witness is None else await _asked(witness)
        if before is not None and after is not None and before != after:
            self.book.changed(before, after)
            for name in replicas.keys() - present:
                self.attached(replicas[name])


def _answers(replica: ManagedReplica) -> bool:
    return replica.facts is not None and replica.facts.takes_managed


async def _asked(
    replica: ManagedReplica,
    elsewhere: ManagedAdapters = _NOTHING,
    gone: TakenBack = _NOTHING_GONE,
) -> ManagedAdapters | None:
    """Return what a replica has; None: it is gone, or cannot say."""
    try:
        return await replica.managing.managed(elsewhere, gone)
    except LoraxError as error:
        logger.warning("replica %s does not say what was managed there: %s", replica.name, error)
        return None
