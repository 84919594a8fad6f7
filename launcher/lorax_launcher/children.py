"""One child process: its pipes, its output, how it reports and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

# The longest line passed on whole; a longer one is passed on in parts.
MAX_LINE_BYTES = 1 << 20
# Seconds that output and reports may take to arrive after the process has ended.
_LINGER_S = 2.0

OnLine = Callable[[str, str], None]


class _Pipes:
    """The four pipes between the launcher and one child, as (read, write) ends.

    Made here and not by asyncio, whose ``wait()`` would last until whatever the child
    started has closed its output too.
    """

    def __init__(self) -> None:
        self.lifeline = os.pipe()
        self.report = os.pipe()
        self.out = os.pipe()
        self.err = os.pipe()

    def close_theirs(self) -> None:
        """Close the ends that the child has copies of."""
        for descriptor in (self.lifeline[0], self.report[1], self.out[1], self.err[1]):
            os.close(descriptor)

    def close_ours(self) -> None:
        """Close the ends that a running child would be watched through."""
        for descriptor in (self.lifeline[1], self.report[0], self.out[0], self.err[0]):
            os.close(descriptor)


class Child:
    """A running program in a session of its own, so that Ctrl-C reaches the launcher alone.

    It gets a lifeline as standard input, which the kernel closes however the
    launcher ends, and one pipe on which it reports a single JSON line.
    """

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, pipes: _Pipes, on_line: OnLine
    ) -> None:
        self.name = name
        self.exited: asyncio.Task[int] = asyncio.create_task(process.wait())
        self._process = process
        self._lifeline = pipes.lifeline[1]
        self._is_closed = False
        self._report = asyncio.create_task(_read_report(pipes.report[0]))
        self._pumps = [
            asyncio.create_task(_pump(pipe[0], name, on_line)) for pipe in (pipes.out, pipes.err)
        ]

    @classmethod
    async def start(
        cls,
        name: str,
        make_argv: Callable[[int], Sequence[str]],
        *,
        on_line: OnLine,
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """Start a program; ``make_argv`` is given the descriptor that the child reports on."""
        pipes = _Pipes()
        try:
            process = await asyncio.create_subprocess_exec(
                *make_argv(pipes.report[1]),
                stdin=pipes.lifeline[0],
                stdout=pipes.out[1],
                stderr=pipes.err[1],
                pass_fds=(pipes.report[1],),
                start_new_session=True,
                env=None if environment is None else dict(environment),
            )
        except BaseException:
            pipes.close_ours()
            raise
        finally:
            pipes.close_theirs()
        return cls(name, process, pipes, on_line)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return not self.exited.done()

    @property
    def serves(self) -> bool:
        """Whether it runs and has reported that it is ready."""
        return self.is_running and self._report.done() and self._report.result() is not None

    async def report(self) -> dict[str, Any] | None:
        """Wait for the child's one report; None when it ended without one."""
        await asyncio.wait({self._report, self.exited}, return_when=asyncio.FIRST_COMPLETED)
        # A child may report and end at once: what it wrote is still in the pipe.
        await asyncio.wait({self._report}, timeout=_LINGER_S)
        return self._report.result() if self._report.done() else None

    def terminate(self) -> None:
        """Ask the process to end; one that was stopped is woken to hear it."""
        if not self.is_running:
            return
        # Not by the process' own method: it looks first whether the process has ended, and if the
        # first signal has ended it, takes its exit code from whoever waits for it.
        for each in (signal.SIGTERM, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, each)

    def kill(self) -> None:
        """End the process and whatever it started."""
        if self._is_closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Take in the last output of a process that has ended, and let go of its pipes."""
        if self._is_closed:
            return
        self.kill()
        self._is_closed = True
        tasks = [*self._pumps, self._report]
        await asyncio.wait(tasks, timeout=_LINGER_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        os.close(self._lifeline)


async def iter_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the lines of a stream without their ends; overlong lines come in parts."""
    rest = b""
    while chunk := await stream.read(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield _text(line)
        if len(rest) > MAX_LINE_BYTES:
            yield _text(rest)
            rest = b""
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").rstrip("\r")


@contextlib.asynccontextmanager
async def _reader_of(descriptor: int) -> AsyncIterator[asyncio.StreamReader]:
    """Read a pipe in the event loop; closes the descriptor at the end."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    try:
        yield reader
    finally:
        transport.close()


async def _pump(descriptor: int, name: str, on_line: OnLine) -> None:
    async with _reader_of(descriptor) as reader:
        async for line in iter_lines(reader):
            on_line(name, line)


async def _read_report(descriptor: int) -> dict[str, Any] | None:
    """Read one JSON line from a pipe; None when it ends or holds something else."""
    async with _reader_of(descriptor) as reader:
        try:
            document = json.loads(await reader.readline())
        except ValueError:
            return None
    return document if isinstance(document, dict) else None
