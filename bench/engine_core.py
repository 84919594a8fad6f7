"""The engine loop alone in front of a shard, for ``bench.http_stream``."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from lorax_contract.step import (
    FinishCode,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
    WarmupSpec,
)
from lorax_proto import generate_pb2 as pb
from lorax_router.core.settings import CoreSettings, make_scheduler
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.service.engine.port import TokenStream
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.shards.group import ShardGroup
from lorax_router.shards.grpc_client import GrpcShardClient

STEPS = (pb.DecodeRequest, pb.PrefillRequest)


class WatchedClient(GrpcShardClient):
    """Notes what lies between a step's reply, read, and the next request, to be written."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        # Seconds that passed, and seconds of the thread that all of it runs in: the same on a
        # machine that does nothing else.
        self.turns: list[tuple[float, float]] = []
        self._replied_at = 0.0
        self._thread_s = 0.0
        self._codec_s = 0.0

    async def _call(
        self, method: Callable[..., Awaitable[Any]], request: Any, *args: Any, **options: Any
    ) -> Any:
        if not isinstance(request, STEPS):
            return await super()._call(method, request, *args, **options)
        if self._replied_at:
            passed_s = time.perf_counter() - self._replied_at
            thread_s = time.thread_time() - self._thread_s
            self.turns.append((passed_s + self._codec_s, thread_s + self._codec_s))
        reply = await super()._call(method, request, *args, **options)
        self._codec_s = _codec_s(request, reply)
        self._replied_at, self._thread_s = time.perf_counter(), time.thread_time()
        return reply


def _codec_s(request: Any, reply: Any) -> float:
    """Return what the transport takes to write such a request and to read such a reply."""
    data = reply.SerializeToString()
    start = time.thread_time()
    request.SerializeToString()
    type(reply).FromString(data)
    return time.thread_time() - start


async def run_core(
    uri: str, num_streams: int, num_tokens: int, depth: int
) -> tuple[float, list[tuple[float, float]]]:
    """Run so many streams; return the processor seconds and, at depth 1, each turn's seconds."""
    client = WatchedClient(uri) if depth == 1 else GrpcShardClient(uri)
    group = ShardGroup([client])
    info = await group.info()
    num_blocks = await group.warmup(
        WarmupSpec(
            max_input_length=1024, max_step_tokens=4096, max_rows=num_streams, max_total_tokens=4096
        )
    )
    settings = CoreSettings(
        policy="fair", num_blocks=num_blocks, block_size=info.block_size, max_step_tokens=4096,
        max_rows=num_streams, depth=depth, max_resident=1,
    )  # fmt: skip
    scheduler = make_scheduler(settings)
    metrics = Metrics(model_name="fake", max_input_length=1024, max_total_tokens=4096)
    loop = EngineLoop(group, scheduler, observer=metrics)
    running = asyncio.ensure_future(loop.run())
    await _read_all(loop, num_streams, 10)
    start = time.process_time()
    await _read_all(loop, num_streams, num_tokens)
    cpu_s = time.process_time() - start
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await group.close()
    return cpu_s, client.turns if isinstance(client, WatchedClient) else []


async def _read_all(loop: EngineLoop, num_streams: int, num_tokens: int) -> None:
    rng = random.Random(0)
    streams = [
        loop.submit(_spec(loop.new_request_id(), rng, num_tokens)) for _ in range(num_streams)
    ]
    await asyncio.gather(*map(_read, streams))


def _spec(request_id: RequestId, rng: random.Random, num_tokens: int) -> RequestSpec:
    return RequestSpec(
        request_id=request_id,
        prompt_ids=[rng.randrange(900) for _ in range(8)],
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=num_tokens),
    )


async def _read(stream: TokenStream) -> None:
    async for chunk in stream:
        if chunk.finish is not FinishCode.RUNNING:
            return
