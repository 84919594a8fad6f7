"""What the engine loop does when the shards are lost: notice it, wait for others, plan for those."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from typing import TypeVar

from lorax_contract.errors import RowFailedError, ShardError, ShardUnavailableError
from lorax_contract.step import RequestSpec
from lorax_router.core.isolation import ShardsLost
from lorax_router.core.ports import SessionSource, ShardSession
from lorax_router.core.scheduler import Scheduler
from lorax_router.service.engine.orders import AdapterOrders
from lorax_router.service.engine.port import StepObserver

logger = logging.getLogger(__name__)

# A step has hung that lasts so many times as long as it should.
_HANG_TIMES = 20.0
# Requests that have ended the shards, and for how long others like them are refused.
_MAX_DEADLY, _DEADLY_S = 64, 600.0
# How often requests are looked at, while there are no shards, for those that are too late.
_LOOK_S = 0.5

Result = TypeVar("Result")


class Losses:
    """Owned by the engine loop, whose scheduler it moves from one group of shards to the next.

    Args:
        scheduler: plans for the shards.
        sessions: gives those that come next; None: a loss is the end.
        orders: of adapters, which are void with the shards that they were for.
        clock: the engine's.
        least_hang_s: seconds that a step lasts at least before it is taken for one that hangs.
        on_loss: called when something else than a step has shown one.
        observer: told of losses, for metrics.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        sessions: SessionSource | None,
        orders: AdapterOrders | None,
        clock: Callable[[], float],
        least_hang_s: float,
        on_loss: Callable[[], None],
        observer: StepObserver | None = None,
    ) -> None:
        self._observer = observer
        self._scheduler = scheduler
        self._sessions = sessions
        self._orders = orders
        self._clock = clock
        self._least_hang_s = least_hang_s
        self._on_loss = on_loss
        # Whether there are shards, and not only others to come.
        self.has_shards = True
        # Whether others are waited for when they are lost.
        self._goes_on = sessions is not None
        # That the shards are gone, as something else than a step's error has shown.
        self.known: ShardError | None = None
        # What is not computed any more, why and until when; the latest last.
        self._deadly: dict[Hashable, tuple[str, float]] = {}
        if sessions is not None:
            sessions.on_lost = self.notice

    def notice(self, error: ShardError) -> None:
        """Something beside the steps has shown that the shards are gone."""
        self.known = self.known or error
        self._on_loss()

    def expect_none(self) -> None:
        """Wait for no others from now on."""
        self._goes_on = False

    async def watched(self, answer: asyncio.Task[Result]) -> Result:
        """Return a step's answer; if it lasts far longer than it should, the shards are lost."""
        watch = self._watch_for_hang(answer)
        try:
            return await answer
        except asyncio.CancelledError:
            task = asyncio.current_task()
            is_told_to_end = task is not None and task.cancelling() > 0
            if self.known is None or is_told_to_end or not answer.cancelled():
                raise
            raise self.known from None
        finally:
            if watch is not None:
                watch.cancel()

    def _watch_for_hang(self, answer: asyncio.Task[Result]) -> asyncio.TimerHandle | None:
        expected_s = None if self._sessions is None else self._scheduler.expected_s
        if expected_s is None:
            return None
        limit_s = max(self._least_hang_s, _HANG_TIMES * expected_s)

        def lose() -> None:
            if answer.cancel():
                self.known = ShardUnavailableError(
                    f"a step that takes {expected_s:.2g} s had no answer after {limit_s:.3g} s"
                )

        return asyncio.get_running_loop().call_later(limit_s, lose)

    async def outlast(
        self, error: ShardError, num_open: int, end_late: Callable[[], None]
    ) -> ShardsLost:
        """Wait for the next group and plan for it; return the requests that end by that, and why.

        ``num_open`` streams wait meanwhile; ``end_late`` is called now and then to end those of
        them that are too late. Raises what says that no other group comes.
        """
        if self._sessions is None or not self._goes_on:
            raise error
        epoch, lost_at = self._scheduler.epoch, self._clock()
        logger.error(
            "the shards are lost: %s; %d requests wait for others", error, num_open,
            extra={"fields": {"event": "shards_lost", "epoch": epoch, "reason": str(error)}},
        )  # fmt: skip
        if self._observer is not None:
            self._observer.shards_lost()
        self.has_shards = False
        is_quiet = self._sessions.is_quiet
        session = await self._next(self._sessions, error, end_late)
        self.has_shards = True
        lost = self._move_to(session, is_quiet=is_quiet)
        self.known = None
        self._sessions.use(session)
        seconds = self._clock() - lost_at
        if self._observer is not None:
            self._observer.shards_back(seconds)
        logger.warning(
            "the shards are back after %.1f s: %d requests go on, %d ended", seconds,
            num_open - len(lost.ended), len(lost.ended),
            extra={"fields": {"event": "shards_back", "epoch": session.info.epoch, "seconds": seconds}},
        )  # fmt: skip
        return lost

    async def _next(
        self, sessions: SessionSource, error: ShardError, end_late: Callable[[], None]
    ) -> ShardSession:
        coming = asyncio.ensure_future(sessions.next(error))
        try:
            while not coming.done():
                await asyncio.wait({coming}, timeout=_LOOK_S)
                end_late()
            return coming.result()
        finally:
            coming.cancel()

    def _move_to(self, session: ShardSession, *, is_quiet: bool) -> ShardsLost:
        lost = self._scheduler.shards_lost(
            self._clock(),
            epoch=session.info.epoch,
            num_blocks=session.num_blocks,
            adapter_bytes=session.info.adapter_bytes or None,
            is_quiet=is_quiet,
        )
        for request_id, text in lost.ended.items():
            logger.error("request %d ends with the shards that were lost: %s", request_id, text)
        if self._orders is not None:
            self._orders.started_anew()
        return lost

    # --- requests that end the shards -----------------------------------------------

    def remember_deadly(self, spec: RequestSpec, text: str, now: float) -> None:
        """A request has ended the shards: none like it is computed for a while."""
        self._deadly[_key(spec)] = text, now + _DEADLY_S
        while len(self._deadly) > _MAX_DEADLY:
            del self._deadly[next(iter(self._deadly))]

    def deadly(self, spec: RequestSpec, now: float) -> str | None:
        """Return why a request is not computed, None: it is."""
        if not self._deadly:
            return None
        text, until = self._deadly.get(_key(spec), ("", now))
        return text if until > now else None

    def refuse_deadly(self, spec: RequestSpec, now: float) -> None:
        """Raise RowFailedError for a request like one that has ended the shards."""
        if (text := self.deadly(spec, now)) is not None:
            raise RowFailedError(text)


def _key(spec: RequestSpec) -> Hashable:
    """Return what is the same when a client sends a request once more: a seed may not be."""
    return spec.adapter, tuple(spec.prompt_ids), spec.stopping, spec.constraint
