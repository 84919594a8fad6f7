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


class Child:
    """A running program in a session of its own, so that Ctrl-C reaches the launcher alone.

    It gets a lifeline as standard input, which the kernel closes however the
    launcher ends, and one pipe on which it reports a single JSON line.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, lifeline: int) -> None:
        self.name = name
        self.exited: asyncio.Task[int] = asyncio.create_task(process.wait())
        self._process = process
        self._lifeline = lifeline
        self._is_closed = False
        self._report: asyncio.Task[dict[str, Any] | None] | None = None
        self._pumps: list[asyncio.Task[None]] = []

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
        report_read, report_write = os.pipe()
        lifeline_read, lifeline_write = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *make_argv(report_write),
                stdin=lifeline_read,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(report_write,),
                start_new_session=True,
                env=None if environment is None else dict(environment),
            )
        except BaseException:
            os.close(report_read)
            os.close(lifeline_write)
            raise
        finally:
            os.close(report_write)
            os.close(lifeline_read)
        child = cls(name, process, lifeline_write)
        await child._listen(report_read, on_line)
        return child

    async def _listen(self, report_read: int, on_line: OnLine) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._report = asyncio.create_task(_read_report(report_read))
        for stream in (self._process.stdout, self._process.stderr):
            self._pumps.append(asyncio.create_task(self._pump(stream, on_line)))

    async def _pump(self, stream: asyncio.StreamReader, on_line: OnLine) -> None:
        async for line in iter_lines(stream):
            on_line(self.name, line)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return not self.exited.done()

    async def report(self) -> dict[str, Any] | None:
        """Wait for the child's one report; None when it ended without one."""
        assert self._report is not None
        await asyncio.wait({self._report, self.exited}, return_when=asyncio.FIRST_COMPLETED)
        # A child may report and end at once: what it wrote is still in the pipe.
        await asyncio.wait({self._report}, timeout=_LINGER_S)
        return self._report.result() if self._report.done() else None

    def terminate(self) -> None:
        """Ask the process to end."""
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)

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
        tasks = [*self._pumps, *([self._report] if self._report else [])]
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


async def _read_report(descriptor: int) -> dict[str, Any] | None:
    """Read one JSON line from a pipe; None when it ends or holds something else."""
    reader = asyncio.StreamReader()
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        document = json.loads(await reader.readline())
    except ValueError:
        return None
    finally:
        transport.close()
    return document if isinstance(document, dict) else None
