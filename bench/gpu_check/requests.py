"""The requests of the end-to-end stages, and two ways to send them.

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

from bench.gpu_check.machine import ROOT

from lorax_contract.config import RouterConfig
from lorax_contract.step import FinishCode
from lorax_router.service.requests import GenerateParameters, GenerateRequest
from lorax_router.shards.group import ShardGroup
from lorax_router.startup import ServiceParts, assemble_service, load_language, size

HTTP_PACKAGES = ("fastapi", "uvicorn", "pydantic", "httptools", "orjson", "grpc_health",
                 "grpc_reflection")  # fmt: skip
_PROGRAMS = {"lorax-shard": "lorax_shard.cli", "lorax-router": "lorax_router.cli"}


class RequestLoad(NamedTuple):
    """Requests that are all sent at once: request i asks for adapter i modulo their number."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    adapters: tuple[str, ...] = ()

    def texts(self) -> list[str]:
        """Return the prompts; they differ from their first token on."""
        words = "the quick brown fox jumps over the lazy dog while many adapters share one model"
        long = f"{words} " * self.prompt_tokens
        return [f"{number} {long}" for number in range(self.num_requests)]

    def adapter(self, number: int) -> str | None:
        """Return the adapter of a request."""
        return self.adapters[number % len(self.adapters)] if self.adapters else None


class LoadResult(NamedTuple):
    """What a load took."""

    seconds: float
    num_tokens: int

    @property
    def tokens_s(self) -> float:
        """Output tokens per second."""
        return self.num_tokens / self.seconds


def missing_http() -> list[str]:
    """Return the packages of the HTTP server that are not installed."""
    return [name for name in HTTP_PACKAGES if importlib.util.find_spec(name) is None]


@contextlib.asynccontextmanager
async def router_service(
    model_dir: Path, shard_uri: str, *, max_total_tokens: int = 512
) -> AsyncIterator[ServiceParts]:
    """Run the router without a front end over shards that serve already."""
    config = RouterConfig(
        model_id="random", tokenizer_dir=str(model_dir), shard_uri=shard_uri,
        default_adapter_source="local", max_batch_prefill_tokens=2048, max_total_tokens=max_total_tokens,
    )  # fmt: skip
    language = load_language(config)
    shards = await ShardGroup.connect(shard_uri)
    try:
        info, budgets = await size(config, shards)
        parts = assemble_service(config, shards, language, info, budgets)
        engine = asyncio.create_task(parts.engine.run())
        try:
            yield parts
        finally:
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)
            await parts.prompts.close()
    finally:
        await shards.close()


async def send_to_service(parts: ServiceParts, load: RequestLoad) -> LoadResult:
    """Send all requests to the router's service and read their streams to the end."""

    async def one(number: int, text: str) -> int:
        parameters = GenerateParameters(
            adapter_id=load.adapter(number), max_new_tokens=load.output_tokens,
            truncate=load.prompt_tokens, ignore_eos_token=True,
        )  # fmt: skip
        stream = await parts.service.generate_stream(
            GenerateRequest(inputs=text, parameters=parameters)
        )
        async with stream:
            async for chunk in stream:
                if chunk.finish is not FinishCode.RUNNING:
                    break
            return stream.num_generated

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(*each) for each in enumerate(load.texts())))
    return checked(load, counts, time.perf_counter() - started)


def send_to_server(url: str, load: RequestLoad) -> LoadResult:
    """Send all requests over HTTP, a thread a stream, and read them to the end."""
    counts = [0] * load.num_requests

    def one(number: int, text: str) -> None:
        parameters = {
            "max_new_tokens": load.output_tokens, "truncate": load.prompt_tokens,
            "ignore_eos_token": True, "adapter_id": load.adapter(number),
        }  # fmt: skip
        request = urllib.request.Request(
            f"{url}/generate_stream",
            json.dumps({"inputs": text, "parameters": parameters}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            counts[number] = sum(line.startswith(b"data:") and b'"token"' in line
                                 for line in response)  # fmt: skip

    threads = [threading.Thread(target=one, args=each) for each in enumerate(load.texts())]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return checked(load, counts, time.perf_counter() - started)


def checked(load: RequestLoad, counts: Sequence[int], took: float) -> LoadResult:
    """Return what a load took, if every request got all of its tokens."""
    short = [count for count in counts if count != load.output_tokens]
    if short:
        raise RuntimeError(
            f"{len(short)} of {load.num_requests} requests got other than {load.output_tokens} "
            f"tokens: {sorted(set(short))}"
        )
    return LoadResult(took, sum(counts))


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
