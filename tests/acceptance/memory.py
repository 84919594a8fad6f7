"""How much memory the processes of a server hold, watched while something goes on."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil
from tests.helpers.server import Server

MIB = 1 << 20


def held(server: Server) -> dict[str, int]:
    """Return resident MiB by what a process is: router and its renderers, shards, the fetchers."""
    assert server.process is not None
    found: dict[str, int] = {}
    for child in psutil.Process(server.process.pid).children(recursive=True):
        try:
            words = " ".join(child.cmdline())
            size = child.memory_info().rss // MIB
        except psutil.Error:
            continue
        name = next((n for n in ("fetching", "render", "shard", "router") if n in words), "other")
        found[name] = found.get(name, 0) + size
    return found


class MemoryWatch:
    """Samples ``held`` until it is closed; ``most`` is the largest sum seen of each kind."""

    def __init__(self, server: Server, every_s: float = 0.2) -> None:
        self.start = held(server)
        self.most = dict(self.start)
        self._server, self._every_s = server, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(self._every_s):
            for name, size in held(self._server).items():
                self.most[name] = max(self.most.get(name, 0), size)

    @property
    def grown(self) -> int:
        """MiB that router, renderers and fetchers took at most beyond what they had."""
        names = [name for name in self.most if name != "shard"]
        return sum(self.most[name] - self.start.get(name, 0) for name in names)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
