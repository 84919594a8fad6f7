"""The shard groups that serve one after the other, as one that goes on.

A session is one incarnation of the shard group: its epoch, its clients, its pool. When the group
is lost, calls beside the steps wait for the next session and are made again there; steps and what
belongs to an epoch fail, and the engine loop plans anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterTiers,
    FetchedAdapter,
    LoadReport,
)
from lorax_contract.constraint import Constraint
from lorax_contract.errors import (
    GenerationError,
    LoraxError,
    ShardError,
    ShardUnavailableError,
    StaleEpochError,
)
from lorax_contract.step import AdapterHandle, ShardInfo, StepOutcome, StepPlan, WarmupSpec
from lorax_router.core.ports import ShardClient, ShardSession

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A call that belongs to no epoch is made in so many sessions, if each is lost meanwhile.
_MOST_LOSSES = 3
# What says that a whole group is gone, and not that one call of it failed.
LOST = (ShardUnavailableError, StaleEpochError)


# Connects to the group that comes after an epoch and warms it up; ShardError when none comes.
Connect = Callable[[int], Awaitable[ShardSession]]


class ShardSessions:
    """Implements ShardClient over the session that serves now, which it owns, and SessionSource.

    Args:
        first: serves from the start.
        connect: makes the next one.
    """

    def __init__(self, first: ShardSession, connect: Connect) -> None:
        self._session = first
        self._connect = connect
        self._change: asyncio.Future[None] | None = None
        # Why the session that serves is gone; None: it is not known to be.
        self._loss: ShardError | None = None
        # Why none serves any more.
        self._end: ShardError | None = None
        # Is told of a loss that no step has shown.
        self.on_lost: Callable[[ShardError], None] = lambda _: None
        self._watch: asyncio.Task[None] | None = None
        self._num_compiling = 0

    # --- sessions ---------------------------------------------------------------

    def watch(self) -> None:
        """Notice from now on, too, when a group is lost while no step runs."""
        self._watch = asyncio.ensure_future(self._report_end(self._session))

    async def next(self, loss: ShardError) -> ShardSession:
        """Return what serves after the group that is lost, once it is there; ``use`` it then.

        Raises ShardError when none comes.
        """
        self._loss = loss
        lost = self._session
        with contextlib.suppress(LoraxError):
            await lost.shards.close()
        return await self._connect(lost.info.epoch)

    def use(self, session: ShardSession) -> None:
        """Let a session serve: calls that waited for it are made now."""
        self._session, self._loss = session, None
        if self._watch is not None:
            self._watch.cancel()
            self.watch()
        if self._change is not None:
            self._change.set_result(None)
            self._change = None

    def end(self, error: ShardError) -> None:
        """Nothing serves any more: calls that wait fail."""
        self._loss = self._end = error
        if self._change is not None:
            self._change.set_exception(error)
            self._change.exception()  # whether anybody waits or not
            self._change = None

    async def _report_end(self, session: ShardSession) -> None:
        error = await session.shards.lost()
        if session is self._session and self._loss is None:
            self.on_lost(error)

    async def _after(self, session: ShardSession, error: ShardError) -> ShardSession:
        """Return the session that comes after one whose call failed; raises the error if it lives."""
        if session is self._session and self._loss is None:
            if not await self._is_gone(session, error):
                raise error
            if session is self._session and self._loss is None:
                self.on_lost(error)
        if self._end is not None:
            raise self._end
        if session is self._session:
            if self._change is None:
                self._change = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._change)
        return self._session

    async def _is_gone(self, session: ShardSession, error: ShardError) -> bool:
        """Whether all is lost and not only a call that took too long."""
        if isinstance(error, StaleEpochError):
            return True
        try:
            await session.shards.health()
        except LOST:
            return True
        return False

    async def _made_again(self, call: Callable[[ShardClient], Awaitable[Result]]) -> Result:
        """Make a call that belongs to no epoch, in one session after the other until one answers."""
        session = self._session
        for _ in range(_MOST_LOSSES - 1):
            try:
                return await call(session.shards)
            except LOST as error:
                session = await self._after(session, error)
        try:
            return await call(session.shards)
        except LOST as error:
            # It may be what ends them.
            raise GenerationError(
                f"the shards were lost {_MOST_LOSSES} times during one call: {error}",
                public="the shards failed each time that this was tried",
            ) from error

    async def _of_this_epoch(self, call: Callable[[ShardClient], Awaitable[Result]]) -> Result:
        """Make a call of the present epoch; if its group is lost, fail once the next one serves.

        By then whoever asked knows that the call is void.
        """
        session = self._session
        try:
            return await call(session.shards)
        except LOST as error:
            await self._after(session, error)
            raise

    # --- ShardClient ------------------------------------------------------------

    async def info(self) -> ShardInfo:
        """Return what the shards are."""
        return await self._session.shards.info()

    async def warmup(self, spec: WarmupSpec) -> int:
        """Size the KV pool anew."""
        return await self._session.shards.warmup(spec)

    async def step(self, plan: StepPlan) -> StepOutcome:
        """Execute one step."""
        return await self._session.shards.step(plan)

    async def clear(self, seq: int) -> None:
        """Drop all rows."""
        await self._session.shards.clear(seq)

    async def take_over(self, epoch: int) -> None:
        """Begin a later epoch."""
        await self._session.shards.take_over(epoch)

    async def fetch_adapter(self, query: AdapterQuery) -> FetchedAdapter:
        """Have an adapter fetched."""
        return await self._made_again(lambda shards: shards.fetch_adapter(query))

    async def adapter_text(self, store_digest: str, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return text files of a fetched adapter."""
        return await self._made_again(lambda shards: shards.adapter_text(store_digest, names))

    async def prepare_adapter(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        """Make an adapter ready in this epoch."""
        return await self._of_this_epoch(lambda shards: shards.prepare_adapter(handle, content))

    async def release_adapter(
        self, handle: AdapterHandle, forget: Sequence[AdapterPart] = ()
    ) -> None:
        """Free an adapter of this epoch; parts are forgotten by whoever serves."""
        call = self._made_again if forget else self._of_this_epoch
        await call(lambda shards: shards.release_adapter(handle, forget))

    async def prepare_constraint(
        self, constraint: Constraint, content: AdapterContent | None = None
    ) -> None:
        """Make a constraint ready."""
        self._num_compiling += 1
        try:
            await self._made_again(lambda shards: shards.prepare_constraint(constraint, content))
        finally:
            self._num_compiling -= 1

    @property
    def is_quiet(self) -> bool:
        """Whether no constraint is being compiled: adapters are the scheduler's own affair."""
        return not self._num_compiling

    async def adapter_tiers(self, parts: Sequence[AdapterPart]) -> AdapterTiers:
        """Return where adapters lie."""
        return await self._made_again(lambda shards: shards.adapter_tiers(parts))

    async def health(self) -> None:
        """Return if the group that serves is healthy; none serves between two of them."""
        if self._loss is not None:
            raise self._loss
        await self._session.shards.health()

    async def lost(self) -> ShardError:
        """Return once the group that serves is gone."""
        return await self._session.shards.lost()

    async def close(self) -> None:
        """Close the session that serves."""
        if self._watch is not None:
            self._watch.cancel()
        await self._session.shards.close()
