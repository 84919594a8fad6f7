"""Has all replicas have what was managed by hand, through whichever ingress, and when they come later."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from lorax_contract.errors import LoraxError
from lorax_router.fronts.core_facts import CoreFacts
from lorax_router.service.adapters.managed import (
    STEP_S,
    ManagedChange,
    ManagedKnown,
    ManagedRecord,
    Stamp,
    call_stamp,
)

logger = logging.getLogger(__name__)

# So long replicas may know different things: calls that are on their way come to one after the other.
_PATIENCE_S = 2.0


class ManagedCalls(Protocol):
    """Says what was managed by hand at a replica."""

    async def managed(self, changes: Sequence[ManagedChange], since: float = 0.0) -> ManagedKnown:
        """Return what was since then; the replica takes over what it is told. Raises LoraxError."""


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
    """Stamps calls that change what is managed, and tells replicas what they lack of it.

    Args:
        replicas: those that are attached now, by name.
        clock: monotonic seconds.
    """

    def __init__(
        self, replicas: Mapping[str, ManagedReplica], clock: Callable[[], float] = time.monotonic
    ) -> None:
        # What replicas told so far, for those that come later; replicas have what is true.
        self.record = ManagedRecord()
        self._replicas = replicas
        self._clock = clock
        self._telling: set[asyncio.Task[None]] = set()
        self._id = secrets.token_hex(4)
        self._stamped_at = 0.0
        # What stands for all that each replica knows, and since when that is not the same for all.
        self._digests: dict[str, int] = {}
        self._apart_since: float | None = None
        self._evening: asyncio.Task[None] | None = None

    def attached(self, replica: ManagedReplica) -> None:
        """Tell a replica, before anything is asked of it, what the others have.

        One of them is asked, too: it knows what was managed through other ingresses.
        """
        if _answers(replica):
            self._start(replica, self.record.all())
            for witness in self._others(replica)[:1]:
                self._start(witness)

    def lost(self, name: str) -> None:
        """A replica is gone."""
        self._digests.pop(name, None)

    def knows(self, name: str, digest: int | None) -> None:
        """A replica said what stands for all that it knows.

        Where others know something else for longer than calls take, each is told what it lacks.
        """
        if digest is None:
            return
        self._digests[name] = digest
        if len({*self._digests.values()}) == 1:
            self._apart_since = None
        elif self._apart_since is None:
            self._apart_since = self._clock()
        elif self._clock() - self._apart_since >= _PATIENCE_S:
            self._apart_since = self._clock()
            # A replica that hangs holds up one of them, and no more are begun meanwhile.
            if self._evening is None or self._evening.done():
                self._evening = self._follow(self._even_out())

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """A call that changes something is sent to all replicas meanwhile, with one stamp.

        One that is attached meanwhile is told of it.
        """
        present = {**self._replicas}
        stamp = await self._stamp()
        token = call_stamp.set(stamp)
        try:
            yield
        finally:
            call_stamp.reset(token)
        if asked := [each for each in present.values() if _answers(each)]:
            self.record.take((await _ask(asked[0], since=stamp.at)).changes)
        for name in self._replicas.keys() - present.keys():
            self.attached(self._replicas[name])

    async def _stamp(self) -> Stamp:
        """Return a stamp that is later than all that replicas know: no clock of ours has to be right."""
        asked = [each for each in self._replicas.values() if _answers(each)]
        known = await asyncio.gather(*(_ask(each, since=math.inf) for each in asked))
        at = max((each.clock for each in known), default=0.0) or time.time()
        self._stamped_at = max(at, self._stamped_at + STEP_S)
        return Stamp(self._stamped_at, self._id)

    def _start(self, replica: ManagedReplica, changes: Sequence[ManagedChange] = ()) -> None:
        self._follow(self._tell(replica, changes))

    def _follow(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        return task

    async def _tell(self, replica: ManagedReplica, changes: Sequence[ManagedChange]) -> None:
        """Tell a replica; what is new of what it answers, the others are told."""
        known = await _ask(replica, changes)
        if news := self.record.take(known.changes).news:
            for other in self._others(replica):
                self._start(other, news)

    async def _even_out(self) -> None:
        """Tell each replica what it does not know and others do."""
        asked = [each for each in self._replicas.values() if _answers(each)]
        known = await asyncio.gather(*(_ask(each) for each in asked))
        for each in known:
            self.record.take(each.changes)
        for replica, its in zip(asked, known, strict=True):
            there = {*its.changes}
            if lacking := [each for each in self.record.all() if each not in there]:
                await _ask(replica, lacking)

    def _others(self, replica: ManagedReplica) -> list[ManagedReplica]:
        return [
            each for each in self._replicas.values() if each is not replica and _answers(each)
        ]  # fmt: skip


def _answers(replica: ManagedReplica) -> bool:
    return replica.facts is not None and replica.facts.takes_changes


async def _ask(
    replica: ManagedReplica, changes: Sequence[ManagedChange] = (), since: float = 0.0
) -> ManagedKnown:
    """Return what a replica knows, which is told of changes; nothing if it is gone, or cannot say."""
    try:
        return await replica.managing.managed(changes, since)
    except LoraxError as error:
        logger.warning("replica %s does not say what was managed there: %s", replica.name, error)
        return ManagedKnown(changes=[], clock=0.0)
