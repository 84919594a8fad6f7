"""The router as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.http_app import word_tokenizer

from lorax_contract.config import RouterConfig


class RouterProcess:
    """One ``lorax-router`` with its standard input as lifeline."""

    def __init__(self, process: asyncio.subprocess.Process, ready: asyncio.StreamReader) -> None:
        self.process = process
        self._ready = ready
        # Read all the while: a log that nobody reads would hold the router up.
        assert process.stdout is not None
        self._output = asyncio.ensure_future(process.stdout.read())

    async def ready(self) -> dict[str, Any]:
        """What it announces when it is ready; empty when it ended before."""
        line = await self._ready.readline()
        return json.loads(line) if line else {}

    async def url(self) -> str:
        """Where it serves."""
        return str((await self.ready()).get("url", ""))

    async def ended(self) -> tuple[int, list[dict[str, Any]]]:
        """Its exit code and its log."""
        output = await self._output
        return await self.process.wait(), [json.loads(line) for line in output.splitlines()]


@contextlib.asynccontextmanager
async def started(config: RouterConfig, folder: Path) -> AsyncIterator[RouterProcess]:
    reading, writing = os.pipe()
    path = folder / "router.json"
    path.write_text(replace(config, ready_fd=writing).to_json())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lorax_router.cli", "--config", str(path),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, pass_fds=[writing],
    )  # fmt: skip
    os.close(writing)
    ready = asyncio.StreamReader()
    pipe = os.fdopen(reading, "rb")
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(ready), pipe
    )
    router = RouterProcess(process, ready)
    try:
        yield router
    finally:
        transport.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await router.ended()


def config_of(folder: Path, **overrides: Any) -> RouterConfig:
    word_tokenizer().save(str(folder / "tokenizer.json"))
    values = {
        "model_id": "fake/model",
        "tokenizer_dir": str(folder),
        "shard_uri": f"unix:{folder}/rank-0",
        "hostname": "127.0.0.1",
        "port": 0,
        "lifeline": True,
        **overrides,
    }
    return RouterConfig(**values)
