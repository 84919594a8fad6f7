"""``lorax-ingress`` and routers behind it as processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
from tests.helpers.fake_shard_server import serve
from tests.helpers.router_process import RouterProcess, config_of, started
from tests.helpers.tenants import bearer

from lorax_router.shards.fake.shard import FakeModel, FakeShard

LONG = {
    "inputs": "w1 w2",
    "parameters": {"max_new_tokens": 300, "ignore_eos_token": True, "details": True},
}


@contextlib.asynccontextmanager
async def router(folder: Path, name: str, **config: Any) -> AsyncIterator[RouterProcess]:
    """A router of a name, over a FakeShard of its own, that ingresses attach to."""
    own = folder / name
    own.mkdir(exist_ok=True)
    (own / "chat_template.jinja").write_text(
        "{% for each in messages %}{{ each['content'] }} {% endfor %}"
    )
    model = FakeModel(vocab_size=900, eos_token_ids=frozenset())
    shard = FakeShard(model, num_blocks=2000, block_size=4, step_delay_s=0.01)
    values = {"ingress_uri": uri_of(folder, name), **config}
    async with serve([shard], own), started(config_of(own, **values), own) as process:
        process.address = (await process.ready())["url"]  # type: ignore[attr-defined]
        yield process


def uri_of(folder: Path, name: str) -> str:
    return f"unix:{folder}/{name}.ingress"


class IngressProcess:
    """One ``lorax-ingress``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.grpc_port = 0
        self.metrics = ""
        self._reading = asyncio.create_task(self._read())
        self.log: list[dict[str, Any]] = []

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.log.append(json.loads(line))
            if self.log[-1].get("event") == "grpc":
                self.grpc_port = self.log[-1]["port"]
            if self.log[-1].get("event") == "ready":
                self.metrics = self.log[-1].get("metrics", "")
                self._url.set_result(self.log[-1]["url"])

    def client(self, url: str, key: str = "") -> httpx.AsyncClient:
        headers = bearer(key) if key else {}
        return httpx.AsyncClient(base_url=url, timeout=30, headers=headers)

    async def url(self) -> str:
        return await self._url

    async def end(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        code = await self.process.wait()
        await self._reading
        return code


@contextlib.asynccontextmanager
async def ingress(folder: Path, *names: str, **options: str) -> AsyncIterator[IngressProcess]:
    """An ingress over routers of these names; an option without a value is a flag."""
    words = [f"--replica={name}={uri_of(folder, name)}" for name in names]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(f"{flag}={value}" if value else flag)
    made = IngressProcess(
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "lorax_ingress.cli", "--port=0", *words,
            stdout=asyncio.subprocess.PIPE,
        )
    )  # fmt: skip
    try:
        yield made
    finally:
        await made.end()


def in_time(scene: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    def test(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(scene(tmp_path), 120))

    test.__name__, test.__doc__ = scene.__name__, scene.__doc__
    return test


async def streamed(client: httpx.AsyncClient, begun: asyncio.Event | None = None) -> list[int]:
    """The ids of a stream to its end, which says that it is one."""
    ids: list[int] = []
    async with client.stream("POST", "/generate_stream", json=LONG) as stream:
        async for line in stream.aiter_lines():
            if not line.startswith("data:"):
                continue
            event = json.loads(line[5:])
            assert "error" not in event, event
            ids.append(event["token"]["id"])
            if begun is not None and len(ids) == 5:
                begun.set()
    assert event["details"]["finish_reason"] == "length"
    return ids


async def sample(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(each.rsplit(" ", 1)[1]) for each in lines if each.startswith(name))
