"""The router's end of a limited process: ask it, end it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from lorax_contract import confine
from lorax_router.service.processes import frames
from lorax_router.service.processes.serving import PATIENCE_S

_MAX_ANSWER_BYTES = 64 << 20
_LEAST_NICE = 19
# Until the system may take what it did not take at once.
_AGAIN_S = 0.15
# Between two looks at what a process has computed.
_LEAST_LOOK_S = 0.01


class ProcessLostError(Exception):
    """A limited process ended, or was ended, before it answered; the text says how."""

    def __init__(self, text: str, *, overdue: bool = False, killed: bool = False) -> None:
        super().__init__(text)
        # Whether its time was over.
        self.overdue = overdue
        # Whether others ended it, as the kernel does when memory runs out: nobody's question
        # is to blame.
        self.killed = killed


class LimitedProcess:
    """One running process; asked one question at a time.

    Args:
        questions: what it reads.
        answers: what it writes.
        reap: ends the process if it runs, waits until it is gone and returns its exit code.
    """

    def __init__(
        self,
        questions: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        reap: Callable[[], Awaitable[int]],
    ) -> None:
        self._reap = reap
        self._gone: asyncio.Future[int] | None = None
        self._questions = questions
        self._answers = answers
        self.is_lost = False
        # The process' id, once it is ready.
        self.pid = 0
        # Whether it computes only where nobody else does; for good.
        self.gave_way = False
        # By how much its session gives way: as it is to be, and as the system was told last.
        self._nice = 0
        self._told_nice: int | None = None

    async def be_ready(self) -> None:
        """Wait for its first words; raises ProcessLostError."""
        self.pid = int((await self._receive())["ready"])

    async def ask(
        self, question: frames.Document, blobs: Sequence[bytes] = (), *, deadline_s: float
    ) -> dict[str, Any]:
        """Return the answer; raises ProcessLostError, then the process is gone.

        One that has computed for ``deadline_s`` and has not answered, or whose caller is cancelled,
        is ended.
        """
        try:
            async with asyncio.timeout(None) as waiting:
                end = self.after_computing(
                    deadline_s, lambda: waiting.reschedule(0.0), patience_s=PATIENCE_S
                )
                with contextlib.closing(end):
                    await self._send(question, blobs)
                    return await self._receive()
        except TimeoutError as error:
            await self.end()
            raise ProcessLostError(f"no answer after {deadline_s:g} s", overdue=True) from error
        except BaseException:
            await self.end()
            raise

    def after_computing(
        self, seconds: float, call: Callable[[], None], *, patience_s: float = math.inf
    ) -> ComputingTimer:
        """Call back once it has computed for so long from now, or after ``patience_s`` by the clock."""
        return ComputingTimer(self.computed_s, seconds, call, patience_s)

    def computed_s(self) -> float:
        """Return for how long it has computed; by the clock where the system does not tell.

        0 for one that has ended.
        """
        if sys.platform != "linux":
            return time.monotonic()
        try:
            return time.clock_gettime(_clock_of(self.pid))
        except OSError:
            return 0.0

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked; others may have ended it, as when memory ran out."""
        return not (self.is_lost or self._answers.at_eof())

    def give_way(self) -> None:
        """Let it compute only where nobody else wants to, from now on."""
        self.gave_way = True
        if not self.is_alive:
            return
        with contextlib.suppress(OSError):
            if sys.platform == "linux":
                os.sched_setscheduler(self.pid, os.SCHED_IDLE, os.sched_param(0))
            else:
                os.setpriority(os.PRIO_PROCESS, self.pid, _LEAST_NICE)
        self.compute_less(_LEAST_NICE)

    def compute_less(self, nice: int) -> None:
        """Let its session, which is its own, give way by so much from now on, or by less again."""
        self._nice = nice
        self._tell_nice()

    def _tell_nice(self) -> None:
        if self._nice == self._told_nice or not self.is_alive:
            return
        if confine.session_computes_less(self.pid, self._nice):
            self._told_nice = self._nice
        else:
            asyncio.get_running_loop().call_later(_AGAIN_S, self._tell_nice)

    async def end(self) -> None:
        """End it at once and return when it is gone; more than once does nothing."""
        await self._exit_code()

    async def _send(self, question: frames.Document, blobs: Sequence[bytes]) -> None:
        # One that ends while it is asked may have said why: that is read next.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._questions.writelines(frames.pack(question, blobs))
            await self._questions.drain()

    async def _receive(self) -> dict[str, Any]:
        try:
            return await frames.receive(self._answers, _MAX_ANSWER_BYTES)
        except asyncio.IncompleteReadError as error:
            raise await self._obituary() from error
        except ValueError as error:
            raise ProcessLostError(f"with {error}") from error

    async def _obituary(self) -> ProcessLostError:
        code = await self._exit_code()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return ProcessLostError(how, killed=code == -signal.SIGKILL)

    async def _exit_code(self) -> int:
        """End it unless it has ended, and say how."""
        self.is_lost = True
        self._questions.close()
        if self._gone is None:
            self._gone = asyncio.ensure_future(self._reap())
        return await asyncio.shield(self._gone)


class ComputingTimer:
    """Calls back once a process has computed for a while; on full cores the clock says little of that.

    It looks when that could be so at the earliest, and again as long as it is not.

    Args:
        computed_s: tells for how long the process has computed.
        seconds: after how much more.
        call: called once, unless the timer is closed before.
        patience_s: after so long by the clock it is called in any case.
    """

    def __init__(
        self,
        computed_s: Callable[[], float],
        seconds: float,
        call: Callable[[], None],
        patience_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._computed_s, self._call = computed_s, call
        self._until_s = computed_s() + seconds
        self._end = self._loop.time() + patience_s
        self._arm(seconds)

    def close(self) -> None:
        """Do not call any more."""
        self._handle.cancel()

    def _look(self) -> None:
        left_s = self._until_s - self._computed_s()
        if left_s <= 0 or self._loop.time() >= self._end:
            self._call()
        else:
            self._arm(max(left_s, _LEAST_LOOK_S))

    def _arm(self, seconds: float) -> None:
        at = min(self._loop.time() + seconds, self._end)
        self._handle = self._loop.call_at(at, self._look)


def _clock_of(pid: int) -> int:
    """Return the clock of what a process computes, as Linux numbers those (clock_getcpuclockid(3))."""
    return (~pid << 3) | 2
