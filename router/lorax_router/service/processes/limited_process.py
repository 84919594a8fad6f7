"""The router's end of a limited process: start it, ask it, end it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from lorax_contract import confine
from lorax_contract.errors import LoraxError
from lorax_router.service.processes import frames

_START_S = 60.0
# What it gets of the environment: how to find the program, languages, the time zone.
_PASSED = ("PATH", "HOME", "LANG", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")
_ONE_THREAD = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
_MAX_ANSWER_BYTES = 64 << 20
_LAST_WORDS = 2000
_LEAST_NICE = 19
# Until the system may take what it did not take at once.
_AGAIN_S = 0.15


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
    """One running process; asked one question at a time."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        questions: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
    ) -> None:
        self._process = process
        self._questions = questions
        self._answers = answers
        self.is_lost = False
        # Whether it computes only where nobody else does; for good.
        self.gave_way = False
        # By how much its session gives way: as it is to be, and as the system was told last.
        self._nice = 0
        self._told_nice: int | None = None

    @classmethod
    async def start(cls, module: str, *arguments: str) -> LimitedProcess:
        """Run a module and wait until it is ready; raises LoraxError when it does not get so far."""
        with tempfile.TemporaryFile() as words:
            process = _run([sys.executable, "-P", "-m", module, *arguments], words)
            started = cls(process, *await _connected(process))
            try:
                async with asyncio.timeout(_START_S):
                    await started._receive()
            except (ProcessLostError, TimeoutError) as error:
                await started.end()
                words.seek(0)
                said = words.read().decode(errors="replace")[-_LAST_WORDS:]
                raise LoraxError(f"{module} does not start: {error} {said}", public="") from error
            except BaseException:
                await started.end()
                raise
        return started

    @property
    def pid(self) -> int:
        """The process' id."""
        return self._process.pid

    async def ask(
        self, question: frames.Document, blobs: Sequence[bytes] = (), *, deadline_s: float
    ) -> dict[str, Any]:
        """Return the answer; raises ProcessLostError, then the process is gone.

        One that has not answered after ``deadline_s``, or whose caller is cancelled, is ended.
        """
        try:
            async with asyncio.timeout(deadline_s):
                await self._send(question, blobs)
                return await self._receive()
        except TimeoutError as error:
            await self.end()
            raise ProcessLostError(f"no answer after {deadline_s:g} s", overdue=True) from error
        except BaseException:
            await self.end()
            raise

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked; others may have ended it, as when memory ran out."""
        return not self.is_lost and self._process.poll() is None

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
        self.is_lost = True
        self._process.kill()
        self._questions.close()
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
        return await asyncio.to_thread(self._process.wait)


def _run(command: list[str], words: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process in the thread of the event loop, with which it ends; takes a millisecond.

    Not asyncio's way, which under uvloop forks: gRPC's handlers of a fork would run in the
    midst of its threads. This one copies nothing of the router.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        env=sparse_environment(),
        # An interrupt of the terminal is the router's affair.
        start_new_session=True,
    )


async def _connected(
    process: subprocess.Popen[bytes],
) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
    """Return the ends of a process' pipes in the event loop."""
    loop = asyncio.get_running_loop()
    answers = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(answers), process.stdout)
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.streams.FlowControlMixin(loop), process.stdin
    )
    return asyncio.StreamWriter(transport, protocol, None, loop), answers


def sparse_environment() -> dict[str, str]:
    """What a helper process gets of the environment: no secret, one thread for each library."""
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    passed |= {name: value for name, value in os.environ.items() if name.startswith("LC_")}
    return {**passed, **dict.fromkeys(_ONE_THREAD, "1")}
