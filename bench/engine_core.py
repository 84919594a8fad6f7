"""The engine loop alone in front of a shard, for ``bench.http_stream``."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from functools import partial
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

SERVICE = pb.DESCRIPTOR.services_by_name["LoraxService"].full_name
STEPS = {
    "Prefill": (pb.PrefillRequest, pb.PrefillResponse),
    "Decode": (pb.DecodeRequest, pb.DecodeResponse),
}


class WatchedClient(GrpcShardClient):
    """Notes what lies between the bytes of a step's reply and those of the next request."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        # Seconds that passed, and seconds of the thread that all of it runs in: the same on a
        # machine that does nothing else.
        self.turns: list[tuple[float, float]] = []
        self._replied = (0.0, 0.0)
        for name, (request, reply) in STEPS.items():
            call = self._channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=partial(self._written, request.SerializeToString),
                response_deserializer=partial(self._read, reply.FromString),
            )
            setattr(self._stub, name, call)

    def _read(self, parse: Callable[[bytes], Any], data: bytes) -> Any:
        self._replied = time.perf_counter(), time.thread_time()
        return parse(data)

    def _written(self, write: Callable[[Any], bytes], request: Any) -> bytes:
        data = write(request)
        passed_s, thread_s = self._replied
        if passed_s:
            self.turns.append((time.perf_counter() - passed_s, time.thread_time() - thread_s))
        return data


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
