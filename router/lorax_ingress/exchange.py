"""Has all replicas have what was managed by hand, through whichever ingress, and when they come later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from lorax_contract.errors import LoraxError
from lorax_ingress.managed import ManagedBook
from lorax_router.fronts.core_facts import CoreFacts
from lorax_router.service.adapters.managed import ManagedChange

logger = logging.getLogger(__name__)


class ManagedCalls(Protocol):
    """Says what was managed by hand at a replica."""

    async def managed(self, changes: Sequence[ManagedChange]) -> list[ManagedChange]:
        """Return it; the replica takes over what it is told. Raises LoraxError."""


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
    """Owns the book of what was managed; used in one event loop.

    Args:
        replicas: those that are attached now, by name.
    """

    def __init__(self, replicas: Mapping[str, ManagedReplica]) -> None:
        self.book = ManagedBook()
        self._replicas = replicas
        self._telling: set[asyncio.Task[None]] = set()

    def attached(self, replica: ManagedReplica) -> None:
        """Tell a replica, before anything is asked of it, what the others have.

        One of them is asked, too: it knows what was managed through other ingresses.
        """
        if _answers(replica):
            self._start(replica, self.book.all())
            for witness in self._others(replica)[:1]:
                self._start(witness)

    def _start(self, replica: ManagedReplica, changes: Sequence[ManagedChange] = ()) -> None:
        task = asyncio.get_running_loop().create_task(self._tell(replica, changes))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self, replica: ManagedReplica, changes: Sequence[ManagedChange]) -> None:
        """Tell a replica; what is new of what it answers, the others are told."""
        if news := self.book.told(await _asked(replica, changes)):
            for other in self._others(replica):
                self._start(other, news)

    def _others(self, replica: ManagedReplica) -> list[ManagedReplica]:
        return [
            each for each in self._replicas.values() if each is not replica and _answers(each)
        ]  # fmt: skip

    @asynccontextmanager
    async def noting(self) -> AsyncIterator[None]:
        """Take note of what a call to all replicas changes, by what one of them says after it.

        Those that were attached meanwhile are told of it.
        """
        present = {**self._replicas}
        yield
        asked = [each for each in present.values() if _answers(each)]
        if asked:
            self.book.told(await _asked(asked[0]))
        for name in self._replicas.keys() - present.keys():
            self.attached(self._replicas[name])


def _answers(replica: ManagedReplica) -> bool:
    return replica.facts is not None and replica.facts.takes_changes


async def _asked(
    replica: ManagedReplica, changes: Sequence[ManagedChange] = ()
) -> list[ManagedChange]:
    """Return what a replica knows, which is told of changes; nothing if it is gone, or cannot say."""
    try:
        return await replica.managing.managed(changes)
    except LoraxError as error:
        logger.warning("replica %s does not say what was managed there: %s", replica.name, error)
        return []
