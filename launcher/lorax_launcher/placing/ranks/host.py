"""A rank of a group on another machine than the group's launcher, which hears of it by questions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_launcher.children import Child
from lorax_launcher.placing.programs import ChildProgram
from lorax_launcher.placing.stores import store_folder
from lorax_launcher.placing.tied import tied

# Without a question for so long its launcher is gone, and the rank ends.
_LEASE_S = 15.0
_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class RankNews:
    """What there is to tell of a rank since the last question."""

    lines: tuple[str, ...] = ()
    # What it reported once it was ready.
    report: dict[str, Any] | None = None
    # How it ended.
    code: int | None = None


class RankHost:
    """Runs one rank, again when it is asked to; it ends with this process, or when nobody asks.

    Args:
        store_dir: where this machine keeps adapters.
    """

    def __init__(self, store_dir: str) -> None:
        self._store_dir = Path(store_dir).expanduser()
        self._held = contextlib.ExitStack()
        self._store: Path | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="lorax-rank-")
        self._child: Child | None = None
        self._lines: list[str] = []
        self._asked_at = time.monotonic()

    async def prepare(self, options: tuple[str, ...]) -> str:
        """Have the model on this machine; return what went wrong, or nothing."""
        words = ["--json-output", "--download-only", *options]
        program = ChildProgram("lorax_launcher.cli", words, lambda record: None)
        code = await program.run()
        return "" if code == 0 else program.wrong or f"lorax-launcher ended with {code}"

    async def start(self, config: str, variables: Mapping[str, str]) -> None:
        """Start a rank with a configuration of its launcher's, but adapters in this machine's store."""
        await self.end()
        known = json.loads(config)
        if known["adapter_store_dir"]:
            known["adapter_store_dir"] = str(self._own_store() / "adapters")
        path = Path(self._folder.name) / "config.json"

        def argv(descriptor: int) -> list[str]:
            path.write_text(json.dumps(known | {"ready_fd": descriptor}))
            return tied([sys.executable, "-m", "lorax_shard.cli", "serve", "--config", str(path)])

        self._asked_at = time.monotonic()
        self._lines = []
        self._child = await Child.start(
            "shard", argv, on_line=self._take, environment={**os.environ, **variables}
        )

    def _own_store(self) -> Path:
        if self._store is None:
            self._store = self._held.enter_context(store_folder(self._store_dir))
        return self._store

    def _take(self, _name: str, line: str) -> None:
        self._lines.append(line)

    async def news(self) -> RankNews:
        """Return what there is to tell, after a moment in which there may be more."""
        self._asked_at = time.monotonic()
        child = self._child
        if child is None:
            return RankNews(code=-signal.SIGKILL)
        await asyncio.wait({child.exited}, timeout=_WAIT_S)
        if not child.is_running:
            await child.close()
        lines, self._lines = tuple(self._lines), []
        report = await child.report() if child.serves else None
        return RankNews(lines, report, None if child.is_running else child.exited.result())

    async def watch(self) -> None:
        """End the rank when nobody asks for it any more."""
        while True:
            await asyncio.sleep(1.0)
            if time.monotonic() - self._asked_at > _LEASE_S:
                await self.end()

    def terminate(self) -> None:
        """Ask the rank to end."""
        if self._child is not None:
            self._child.terminate()

    async def close(self) -> None:
        """End the rank, and let go of its store."""
        await self.end()
        self._held.close()
        self._folder.cleanup()

    async def end(self) -> None:
        """End the rank at once."""
        if self._child is not None:
            self._child.kill()
            await self._child.exited
            await self._child.close()
            self._child = None
