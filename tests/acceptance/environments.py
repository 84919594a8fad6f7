"""Environments of their own for other people's programs, and a server of fakes for them."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
import venv
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.fake_shard_server import serve
from tests.helpers.router_process import config_of, started
from tokenizers import Tokenizer

from lorax_router.shards.fake.shard import FakeModel, FakeShard


@contextlib.contextmanager
def environment(*requirements: str) -> Iterator[Path]:
    """An environment with these packages alone; gives the folder of its programs."""
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=True)
        programs = Path(name) / "bin"
        subprocess.run(
            [str(programs / "python"), "-m", "pip", "install", "-q", *requirements], check=True
        )
        yield programs


async def run_program(*command: str, timeout_s: float, **settings: Any) -> tuple[int, str]:
    """Run a program beside the fakes; return its exit code and all that it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, **settings
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        process.kill()
        output, _ = await process.communicate()
        return 124, output.decode(errors="replace")
    return process.returncode or 0, output.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class FakeServer:
    """Where a server of fakes listens."""

    url: str
    # Where its operator asks.
    admin_url: str


@contextlib.asynccontextmanager
async def fake_server(
    model: FakeModel | None = None,
    tokenizer: Tokenizer | None = None,
    template: str | None = None,
    **config: Any,
) -> AsyncIterator[FakeServer]:
    """A whole router over a fake shard: every route, and answers without a model's weight.

    ``template`` is the model's chat template.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = config_of(folder, admin_port=0, chat_template=template, **config)
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
        shard = FakeShard(model, num_blocks=4096, block_size=16)
        async with serve([shard], folder), started(settings, folder) as router:
            ready = await router.ready()
            (admin,) = [each for each in ready["admin"] if each.startswith("http")]
            yield FakeServer(ready["url"], admin)
