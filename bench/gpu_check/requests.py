"""Two ways to send the requests of the end-to-end stage.

With HTTP's packages installed they go through ``lorax-launcher``, router and shard as clients
send them. Where those are missing, the shard is a process all the same, and the router's service
(scheduler, engine loop, validation, streams) runs here and speaks gRPC with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gpu_check.loads import LoadResult, RequestLoad, checked, read_tokenizer
from bench.gpu_check.machine import ROOT
from tokenizers import Tokenizer

from lorax_contract.config import RouterConfig
from lorax_contract.step import StepOutcome, StepPlan
from lorax_router.core.ports import ShardClient
from lorax_router.service.prompts.language import load_language
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt
from lorax_router.shards.group import ShardGroup
from lorax_router.startup import ServiceParts, assemble_service, size

HTTP_PACKAGES = ("fastapi", "uvicorn", "pydantic", "httptools", "orjson", "grpc_health",
                 "grpc_reflection")  # fmt: skip
_PROGRAMS = {"lorax-shard": "lorax_shard.cli", "lorax-router": "lorax_router.cli"}


class TimedShards(ShardGroup):
    """Notes what the steps of a load took in the shard."""

    def __init__(self, ranks: Sequence[ShardClient], *, has_one_store: bool = True) -> None:
        super().__init__(ranks, has_one_store=has_one_store)
        self.forward_s: list[float] = []
        self.step_s: list[float] = []

    async def step(self, plan: StepPlan) -> StepOutcome:
        """Execute one step."""
        outcome = await super().step(plan)
        self.forward_s.append(outcome.forward_ns / 1e9)
        self.step_s.append(outcome.total_ns / 1e9)
        return outcome


class TimedService(NamedTuple):
    """The router's service in this process, and the shards behind it."""

    parts: ServiceParts
    shards: TimedShards
    tokenizer: Tokenizer


def missing_http() -> list[str]:
    """Return the packages of the HTTP server that are not installed."""
    return [name for name in HTTP_PACKAGES if importlib.util.find_spec(name) is None]


@contextlib.asynccontextmanager
async def router_service(
    model_dir: Path, shard_uri: str, *, max_total_tokens: int = 512
) -> AsyncIterator[TimedService]:
    """Run the router without a front end over shards that serve already."""
    config = RouterConfig(
        model_id="random", tokenizer_dir=str(model_dir), shard_uri=shard_uri,
        default_adapter_source="local", max_batch_prefill_tokens=2048, max_total_tokens=max_total_tokens,
    )  # fmt: skip
    language = load_language(config)
    shards = await TimedShards.connect(shard_uri)
    try:
        info, budgets = await size(config, shards)
        parts = assemble_service(config, shards, language, info, budgets)
        engine = asyncio.create_task(parts.engine.run())
        try:
            yield TimedService(parts, shards, read_tokenizer(model_dir))
        finally:
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)
            await parts.prompts.close()
    finally:
        await shards.close()


async def send_to_service(timed: TimedService, load: RequestLoad) -> LoadResult:
    """Send all requests to the router's service and read their streams to the end."""
    queue_s: list[float] = []

    async def one(number: int, text: str) -> int:
        parameters = GenerateParameters(**load.parameters(number))
        sent = time.perf_counter()
        stream = await timed.parts.service.generate_stream(
            GenerateRequest(prompt=TextPrompt(text), parameters=parameters)
        )
        async with stream:
            is_first = True
            async for _, chunk in stream:
                if is_first:
                    queue_s.append(chunk.scheduled_at - sent)
                    is_first = False
            return stream.num_generated

    texts = load.texts(timed.tokenizer)
    shards = timed.shards
    shards.forward_s.clear()
    shards.step_s.clear()
    started = time.perf_counter()
    counts = await asyncio.gather(*(one(*each) for each in enumerate(texts)))
    result = checked(load, counts, time.perf_counter() - started)
    return result._replace(
        queue_s=tuple(queue_s), forward_s=tuple(shards.forward_s), step_s=tuple(shards.step_s)
    )


def send_to_server(url: str, load: RequestLoad, tokenizer: Tokenizer) -> LoadResult:
    """Send all requests over HTTP, a thread a stream, and read them to the end."""
    counts = [0] * load.num_requests

    def one(number: int, text: str) -> None:
        request = urllib.request.Request(
            f"{url}/generate_stream",
            json.dumps({"inputs": text, "parameters": load.parameters(number)}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            counts[number] = sum(line.startswith(b"data:") and b'"token"' in line
                                 for line in response)  # fmt: skip

    threads = [threading.Thread(target=one, args=each) for each in enumerate(load.texts(tokenizer))]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return checked(load, counts, time.perf_counter() - started)


def launcher_command(port: int, options: Sequence[str]) -> list[str]:
    """Return the command line of a launcher that needs no installed program of its own."""
    bind = ["--hostname", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "lorax_launcher.cli", *bind, *options]


def launcher_environment(folder: Path) -> dict[str, str]:
    """Return an environment in which the launcher finds its children's programs.

    A checkout that is only on PYTHONPATH has no console scripts; these take their place.
    """
    for name, module in _PROGRAMS.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        script.chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PWD": str(ROOT)}
