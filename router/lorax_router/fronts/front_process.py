"""A front as the core sees it: a process, the link to it, and the connections that it has."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from typing import Self

import psutil

from lorax_contract.keys import SSL_PASSWORD_VARIABLE
from lorax_router.fronts.desk import CoreParts, FrontDesk
from lorax_router.fronts.handing import hand_over
from lorax_router.fronts.link import Link
from lorax_router.fronts.messages import TellStop, encode
from lorax_router.fronts.plan import FrontPlan
from lorax_router.service.metrics.front_processes import FrontUsage
from lorax_router.service.processes.nursery import sparse_environment

logger = logging.getLogger(__name__)

_MODULE = "lorax_router.fronts.main"


class FrontProcess:
    """One running front. It ends when it is told to, or with the core, or by itself."""

    def __init__(self, number: int, parts: CoreParts) -> None:
        self.number = number
        # Set once it takes connections, and once nothing comes from it any more.
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self._process: subprocess.Popen[bytes]
        self._link: Link
        self._desk = FrontDesk(parts, self._send, self.ready.set, self._note_ended)
        self._connections: socket.socket
        self._num_given = self._num_ended = 0

    @classmethod
    async def start(cls, plan: FrontPlan, parts: CoreParts) -> Self:
        """Start a front by a plan, whose descriptors are set here."""
        front = cls(plan.number, parts)
        ours, theirs = socket.socketpair()
        front._connections, given = socket.socketpair()
        front._connections.setblocking(False)
        try:
            with theirs, given:
                front._process = _run(plan, theirs.fileno(), given.fileno())
        except OSError:
            ours.close()
            front._connections.close()
            raise
        front._link = await Link.over(ours, front._desk.take, front.gone.set)
        front._desk.open()
        return front

    @property
    def pid(self) -> int:
        """The process' id."""
        return self._process.pid

    @property
    def num_connections(self) -> int:
        """Connections that it has, as far as is known."""
        return self._num_given - self._num_ended

    def usage(self) -> FrontUsage | None:
        """Return what it takes; None: it is gone."""
        try:
            process = psutil.Process(self.pid)
            with process.oneshot():
                times = process.cpu_times()
                cpu_s, memory = times.user + times.system, process.memory_info().rss
                return FrontUsage(self.number, self.num_connections, cpu_s, int(memory))
        except psutil.Error:
            return None

    def give(self, connection: socket.socket) -> bool:
        """Give it a connection; False: it takes none now."""
        given = hand_over(self._connections, connection)
        self._num_given += given
        return given

    def stop(self) -> None:
        """Tell it to end once what it has is answered."""
        self._link.send(encode(TellStop()))

    async def end(self) -> int:
        """End it at once, cancel what it asked for, and return its exit code."""
        self._process.kill()
        self._connections.close()
        self._link.close()
        await self._desk.close()
        code = await asyncio.to_thread(self._process.wait)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        return code

    async def exited(self) -> None:
        """Return once the process is gone."""
        await asyncio.to_thread(self._process.wait)

    def _send(self, message: bytes) -> None:
        self._link.send(message)

    def _note_ended(self, count: int) -> None:
        self._num_ended = count


def _run(plan: FrontPlan, link_fd: int, connections_fd: int) -> subprocess.Popen[bytes]:
    """Start the process in the thread of the event loop; not by fork, as gRPC has threads."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", _MODULE],
        stdin=subprocess.PIPE,
        env=_environment(),
        pass_fds=(link_fd, connections_fd),
        # An interrupt of the terminal is the router's affair.
        start_new_session=True,
    )
    assert process.stdin is not None
    line = plan.with_descriptors(link_fd, connections_fd).to_line()
    # It waits for its plan first of all; what holds standard input open is its lifeline.
    process.stdin.write(line)
    process.stdin.flush()
    return process


def _environment() -> dict[str, str]:
    """What it gets of the environment: what the certificate's key takes, and no other secret."""
    secret = os.environ.get(SSL_PASSWORD_VARIABLE)
    return sparse_environment() | ({SSL_PASSWORD_VARIABLE: secret} if secret else {})
