"""What is done to the server meanwhile: to its processes, its sockets, its adapters, its disk."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
from tests.acceptance.faults.server import processes
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.server import Server
from tests.soak.disk import SmallDisk
from tests.soak.requests import ADMIN_KEY

_NUM_NAMES = 6
# Connections that are opened and say nothing, or half of something.
_NUM_STALLED = 8


class Harm:
    """Does one thing after the other, drawn from a seed.

    Args:
        server: suffers it.
        disk: of the server's store of adapters; None: it cannot be filled.
        root: a folder of adapters that the server may read.
        names: the adapters in it, for clients; changed as they come and go.
    """

    def __init__(
        self,
        server: Server,
        disk: SmallDisk | None,
        root: Path,
        names: list[str],
        draw: random.Random,
    ) -> None:
        self._server, self._root, self._names, self._draw = server, root, names, draw
        self._disk = disk
        self.done: Counter[str] = Counter()
        self._stalled: list[socket.socket] = []
        self._num_written = 0
        self.adapters: list[Callable[[], Awaitable[None]]] = [
            self.bring_adapter, self.bring_adapter, self.replace_adapter, self.break_adapter,
            self.unload_adapter, self.remove_adapter, self.stall_sockets,
        ]  # fmt: skip
        if disk is not None:
            self.adapters.append(self.fill_disk)
        self.processes: list[Callable[[], Awaitable[None]]] = [
            self.kill_shard, self.kill_shard, self.kill_router, self.stop_shard, self.stop_router,
        ]  # fmt: skip

    async def play(
        self, acts: list[Callable[[], Awaitable[None]]], pause_s: float, seconds: float
    ) -> None:
        """Do things from a list, one about every ``pause_s``, for some seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (left := end - loop.time()) > 0:
            await asyncio.sleep(min(left, self._draw.uniform(0.5, 1.5) * pause_s))
            if loop.time() < end:
                act = self._draw.choice(acts)
                await act()
                self.done[act.__name__] += 1

    # --- processes ----------------------------------------------------------------

    async def kill_shard(self) -> None:
        self._signal("lorax-shard", signal.SIGKILL)

    async def kill_router(self) -> None:
        self._signal("lorax-router", signal.SIGKILL)

    async def stop_shard(self) -> None:
        await self._stop("lorax-shard")

    async def stop_router(self) -> None:
        await self._stop("lorax-router")

    async def _stop(self, program: str) -> None:
        """Let a process stand still for less than what would be taken for a hang."""
        if self._signal(program, signal.SIGSTOP):
            await asyncio.sleep(self._draw.uniform(0.5, 4.0))
            self._signal(program, signal.SIGCONT)

    def _signal(self, program: str, number: signal.Signals) -> bool:
        found = processes(self._server, program)
        for each in found:
            each.send_signal(number)
        return bool(found)

    # --- adapters -----------------------------------------------------------------

    async def bring_adapter(self) -> None:
        if len(self._names) < _NUM_NAMES:
            self._names.append(str(self._write(self._root / f"a{self._num_written}")))

    async def replace_adapter(self) -> None:
        if self._names:
            folder = Path(self._draw.choice(self._names))
            new, old = (
                self._write(self._root / f"new{self._num_written}"),
                folder.with_suffix(".old"),
            )
            folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old)

    async def break_adapter(self) -> None:
        if self._names:
            path = Path(self._draw.choice(self._names), "adapter_model.safetensors")
            data = bytearray(path.read_bytes())
            for _ in range(20):
                data[self._draw.randrange(min(len(data), 4000))] = self._draw.randrange(256)
            path.with_suffix(".tmp").write_bytes(data)
            path.with_suffix(".tmp").rename(path)

    async def unload_adapter(self) -> None:
        if self._names:
            body = {"adapter_id": self._draw.choice(self._names), "adapter_source": "local"}
            await self._manage("unload", body)

    async def fill_disk(self) -> None:
        """Leave no room in the store, while somebody wants an adapter that is not there yet."""
        assert self._disk is not None
        with self._disk.filled(self._server):
            await self.bring_adapter()
            await asyncio.sleep(self._draw.uniform(1.0, 4.0))

    async def remove_adapter(self) -> None:
        if len(self._names) > 2:
            shutil.rmtree(self._names.pop(self._draw.randrange(len(self._names))))

    async def _manage(self, verb: str, body: dict[str, str]) -> None:
        """Manage an adapter; the server may be away, or not know it (any more)."""
        url = f"http://127.0.0.1:{self._server.admin_port}/v1/adapters/{verb}"
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx.AsyncClient(timeout=60) as http:
            try:
                await http.post(url, json=body, headers=headers)
            except httpx.TransportError:
                return

    def _write(self, folder: Path) -> Path:
        self._num_written += 1
        rank = self._draw.choice((2, 4, 8))
        return write_formula_adapter(default_model_dir(), folder, rank=rank, seed=self._num_written)

    # --- sockets ------------------------------------------------------------------

    async def stall_sockets(self) -> None:
        """Open connections that never say what they want; those of before are dropped."""
        self.let_go()
        for _ in range(_NUM_STALLED):
            try:
                stalled = socket.create_connection(("127.0.0.1", self._server.port), timeout=2)
            except OSError:
                return
            stalled.send(
                b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"[
                    : self._draw.randrange(60)
                ]
            )
            self._stalled.append(stalled)

    def let_go(self) -> None:
        """Close what is stalled."""
        while self._stalled:
            self._stalled.pop().close()
