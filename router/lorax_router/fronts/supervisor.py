"""All fronts of a router: started, given connections, started again when one ends, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from time import monotonic

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_router.fronts.desk import CoreParts
from lorax_router.fronts.front_process import FrontProcess
from lorax_router.fronts.handing import Acceptor
from lorax_router.fronts.plan import FrontPlan
from lorax_router.service.metrics.front_processes import FrontUsage

logger = logging.getLogger(__name__)

# A front that lived for less than this ended quickly, and the next one waits: so many seconds at
# first, and twice as many each time.
_QUICK_S = 10.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
# For a front to take connections, and to end once it was told to; its own server gives clients less.
_START_S = 60.0
_END_S = 10.0


class Fronts:
    """Serves the clients' listener by processes of their own.

    Args:
        plans: one for each front.
        parts: what the core does for them.
        listener: bound and listening.
    """

    def __init__(self, plans: list[FrontPlan], parts: CoreParts, listener: socket.socket) -> None:
        self._plans = plans
        self._parts = parts
        self._acceptor = Acceptor(listener, self._give)
        # Those that take connections.
        self._serving: set[FrontProcess] = set()
        self._num_restarts = 0
        self._all_ready = asyncio.Event()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until ``stop`` is called and the last response is written.

        Raises StartupError when a front does not come up at the start.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for plan in self._plans:
                    group.create_task(self._keep(plan))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def wait_started(self) -> None:
        """Return once all fronts take connections."""
        await self._all_ready.wait()

    def stop(self) -> None:
        """Accept nothing more and make ``run`` return."""
        self._acceptor.stop()
        self._stopping.set()

    def num_restarts(self) -> int:
        """Return how often a front that ended was started again."""
        return self._num_restarts

    def usages(self) -> list[FrontUsage]:
        """Return what each front that serves takes."""
        found = [front.usage() for front in sorted(self._serving, key=lambda each: each.number)]
        return [each for each in found if each is not None]

    async def _keep(self, plan: FrontPlan) -> None:
        """Have one front running until all stop."""
        pause_s = 0.0
        while not self._stopping.is_set():
            began = monotonic()
            try:
                await self._serve_one(plan)
            except OSError as error:
                if not self._all_ready.is_set():
                    raise _not_started(plan.number, str(error)) from error
                logger.error("front %d cannot be started: %s", plan.number, error)
            if self._stopping.is_set():
                return
            is_quick = monotonic() - began < _QUICK_S
            pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S) if is_quick else 0.0
            self._num_restarts += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()

    async def _serve_one(self, plan: FrontPlan) -> None:
        """Run one front until it ends."""
        front = await FrontProcess.start(plan, self._parts)
        try:
            await self._come_up(front)
            await self._first(front.gone, self._stopping)
            if self._stopping.is_set():
                front.stop()
                async with asyncio.timeout(_END_S):
                    await front.exited()
        except TimeoutError:
            logger.warning("front %d does not end; it is ended", plan.number)
        finally:
            self._serving.discard(front)
            code = await front.end()
        if not self._stopping.is_set():
            logger.error(
                "front %d ended (%s); its requests are cancelled, another one is started",
                plan.number,
                code,
            )

    async def _come_up(self, front: FrontProcess) -> None:
        """Return once a front takes connections, or is gone; StartupError at the router's start."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                await self._first(front.ready, front.gone, self._stopping)
        if front.ready.is_set():
            logger.info("front %d serves", front.number, extra={"fields": {"pid": front.pid}})
            self._serving.add(front)
            if len(self._serving) == len(self._plans):
                self._all_ready.set()
            if self._all_ready.is_set():
                self._acceptor.start()
        elif not self._all_ready.is_set() and not self._stopping.is_set():
            raise _not_started(front.number, "what it said stands above")

    def _give(self, connection: socket.socket) -> bool:
        """Give a connection to the front with the fewest that takes it."""
        by_number = sorted(self._serving, key=lambda each: each.num_connections)
        return any(front.give(connection) for front in by_number)

    @staticmethod
    async def _first(*events: asyncio.Event) -> None:
        """Return once one of some events is set."""
        waiting = [asyncio.ensure_future(each.wait()) for each in events]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()


def _not_started(number: int, why: str) -> StartupError:
    return StartupError(
        f"front {number} does not start: {why}; --http-workers 0 serves without it",
        ExitCode.INTERNAL,
    )
