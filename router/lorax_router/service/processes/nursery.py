"""The router's end of a nursery: a process that has loaded all and forks limited processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import IO, Any, Self

from lorax_contract.errors import LoraxError
from lorax_router.service.processes.limited_process import LimitedProcess, ProcessLostError
from lorax_router.service.processes.serving import READY, Bounds

_START_S = 60.0
# What it gets of the environment: how to find the program, languages, the time zone.
_PASSED = ("PATH", "HOME", "LANG", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")
_ONE_THREAD = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
_LAST_WORDS = 2000
_READ_BYTES = 1 << 16


class Nursery:
    """Starts limited processes of one module, each in milliseconds.

    Whoever makes them end again and again, with questions that take too long, makes nobody load
    a module or a tokenizer again: at full speed and beside others' requests. The nursery itself
    is asked nothing and reads nothing foreign. It starts with the first process, and again with
    the next one should it be lost.

    Args:
        module: ends in ``serving.nurse``.
        arguments: the module's own.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._module = module
        self._command = [sys.executable, "-P", "-m", module, *arguments]
        self._running: _NurseryLink | None = None
        self._lock = asyncio.Lock()

    async def start(self, bounds: Bounds) -> LimitedProcess:
        """Start one and wait until it is ready; raises LoraxError when it does not get so far."""
        try:
            async with asyncio.timeout(_START_S):
                async with self._lock:
                    running = await self._run()
                return await running.bear(bounds)
        except (ProcessLostError, TimeoutError) as error:
            raise LoraxError(f"{self._module} does not start: {error}", public="") from error

    async def _run(self) -> _NurseryLink:
        if self._running is not None and self._running.is_lost:
            await self._running.end()
            self._running = None
        if self._running is None:
            self._running = await _NurseryLink.start(self._command)
        return self._running

    async def close(self) -> None:
        """End it, and all that it started."""
        if self._running is not None:
            await self._running.end()


class _NurseryLink:
    """To one nursery that runs; what it is told and what it says is a JSON object a line."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control
        # What it is to say: that it started or ended the process of a number.
        self._replies: dict[tuple[str, int], asyncio.Future[dict[str, Any]]] = {}
        self._input = b""
        self._num_born = 0
        self.is_lost = False
        asyncio.get_running_loop().add_reader(control, self._read)

    @classmethod
    async def start(cls, command: list[str]) -> Self:
        """Run one and wait until all is loaded; raises ProcessLostError with its last words."""
        control, other = socket.socketpair()
        control.setblocking(False)
        with tempfile.TemporaryFile() as words:
            with other:
                running = cls(_run(command, other, words), control)
            try:
                await running._reply(READY)
            except ProcessLostError as error:
                await running.end()
                words.seek(0)
                said = words.read().decode(errors="replace")[-_LAST_WORDS:]
                raise ProcessLostError(f"{error} {said}") from error
            except BaseException:
                await running.end()
                raise
        return running

    async def bear(self, bounds: Bounds) -> LimitedProcess:
        """Return a new process that is ready; raises ProcessLostError."""
        number = self._num_born = self._num_born + 1
        (theirs_to_read, questions), (answers, theirs_to_write) = os.pipe(), os.pipe()
        try:
            ends = [theirs_to_read, theirs_to_write]
            born = self._order({"fork": number, "bounds": asdict(bounds)}, "forked", ends)
        finally:
            os.close(theirs_to_read)
            os.close(theirs_to_write)
        reap = partial(self._end, number)
        try:
            pipes = await _connected(questions, answers)
        except BaseException:
            await reap()
            raise
        process = LimitedProcess(*pipes, reap)
        try:
            await born
            await process.be_ready()
        except BaseException:
            await process.end()
            raise
        return process

    async def end(self) -> None:
        """End it and all its processes, and return when it is gone."""
        self._process.kill()
        self._lose()
        await asyncio.to_thread(self._process.wait)

    async def _end(self, number: int) -> int:
        """End a process, if it has not ended by itself, and return its exit code."""
        try:
            return int((await self._order({"end": number}, "ended"))["code"])
        except ProcessLostError:
            # All that it started went with it.
            return -signal.SIGKILL

    def _order(
        self, order: Mapping[str, Any], word: str, files: Sequence[int] = ()
    ) -> asyncio.Future[dict[str, Any]]:
        """Tell it what to do; returns what it will say to that."""
        (number,) = (value for name, value in order.items() if name in ("fork", "end"))
        reply = self._reply((word, number))
        try:
            # A few bytes for one who does nothing else but read them.
            socket.send_fds(self._control, [json.dumps(order).encode() + b"\n"], files)
        except OSError:
            self._lose()
        return reply

    def _reply(self, key: tuple[str, int]) -> asyncio.Future[dict[str, Any]]:
        reply = asyncio.get_running_loop().create_future()
        if self.is_lost:
            reply.set_exception(ProcessLostError("its nursery was lost"))
        else:
            self._replies[key] = reply
        return reply

    def _read(self) -> None:
        try:
            data = self._control.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            reply = self._replies.pop((said["word"], said["number"]), None)
            if reply is not None and not reply.done():
                reply.set_result(said)

    def _lose(self) -> None:
        """Take in that nothing more comes from it."""
        if self.is_lost:
            return
        self.is_lost = True
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ProcessLostError("its nursery was lost"))
        self._replies.clear()


def _run(command: list[str], control: socket.socket, words: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process in the thread of the event loop, with which it ends; takes a millisecond.

    Not asyncio's way, which under uvloop forks: gRPC's handlers of a fork would run in the
    midst of its threads. This one copies nothing of the router.
    """
    return subprocess.Popen(
        command,
        stdin=control.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=words,
        env=sparse_environment(),
        # An interrupt of the terminal is the router's affair.
        start_new_session=True,
    )


async def _connected(
    questions: int, answers: int
) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
    """Return the ends of a process' pipes in the event loop, which closes them."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    read, write = os.fdopen(answers, "rb", buffering=0), os.fdopen(questions, "wb", buffering=0)
    with ExitStack() as unless_connected:
        unless_connected.callback(write.close)
        unless_connected.callback(read.close)
        incoming, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), read
        )
        unless_connected.callback(incoming.close)
        transport, protocol = await loop.connect_write_pipe(
            lambda: asyncio.streams.FlowControlMixin(loop), write
        )
        unless_connected.pop_all()
    return asyncio.StreamWriter(transport, protocol, None, loop), reader


def sparse_environment() -> dict[str, str]:
    """What a helper process gets of the environment: no secret, one thread for each library."""
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    passed |= {name: value for name, value in os.environ.items() if name.startswith("LC_")}
    return {**passed, **dict.fromkeys(_ONE_THREAD, "1")}
