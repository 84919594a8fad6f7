"""Real gRPC servers around FakeShards, one per rank, on unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from lorax_contract.adapters import AdapterUnavailableError
from lorax_contract.errors import ValidationError
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_proto.convert import (
    constraint_from_proto,
    info_to_proto,
    outcome_to_proto,
    step_from_proto,
    warmup_from_proto,
)
from lorax_proto.convert_adapters import (
    content_from_proto,
    failure_to_proto,
    fetched_to_proto,
    part_from_proto,
    query_from_proto,
    tiers_to_proto,
)
from lorax_proto.transport import SERVER_OPTIONS, status_of
from lorax_router.shards.fake.shard import FakeShard

Handler = Callable[[Any, Any, Any], Awaitable[Any]]


def _mapped(handler: Handler) -> Handler:
    """Delay a call at random if the server jitters, and answer its error as a status."""

    async def call(self: FakeServicer, request: Any, context: Any) -> Any:
        if self.jitter is not None:
            await asyncio.sleep(self.jitter.uniform(0, 0.005))
        try:
            return await handler(self, request, context)
        except Exception as error:
            await context.abort(status_of(error), str(error))

    return call


class FakeServicer(pb_grpc.LoraxServiceServicer):
    """Answers for one FakeShard."""

    def __init__(
        self, shard: FakeShard, uris: Sequence[str], jitter: random.Random | None = None
    ) -> None:
        self.shard = shard
        self.uris = uris
        self.jitter = jitter
        self.num_calls = 0

    @_mapped
    async def Info(self, request, context):
        reply = info_to_proto(await self.shard.info(), rank=self.shard.rank)
        if request.with_adapters:
            parts = [part_from_proto(part) for part in request.adapter_parts]
            reply.adapters.CopyFrom(tiers_to_proto(await self.shard.adapter_tiers(parts)))
        return reply

    @_mapped
    async def ServiceDiscovery(self, request, context):
        return pb.ServiceDiscoveryResponse(urls=self.uris)

    @_mapped
    async def Health(self, request, context):
        await self.shard.health()
        return pb.HealthResponse()

    @_mapped
    async def Warmup(self, request, context):
        num_blocks = await self.shard.warmup(warmup_from_proto(request), request.epoch)
        return pb.WarmupResponse(num_blocks=num_blocks)

    @_mapped
    async def Prefill(self, request, context):
        return await self._step(request, pb.PrefillResponse)

    @_mapped
    async def Decode(self, request, context):
        return await self._step(request, pb.DecodeResponse)

    @_mapped
    async def ClearCache(self, request, context):
        if request.HasField("next_epoch"):
            await self.shard.take_over(request.next_epoch)
        else:
            await self.shard.clear(request.seq, request.epoch)
        return pb.ClearCacheResponse()

    @_mapped
    async def DownloadAdapter(self, request, context):
        try:
            fetched = await self.shard.fetch_adapter(query_from_proto(request))
        except AdapterUnavailableError as error:
            return pb.DownloadAdapterResponse(failure=failure_to_proto(error))
        return pb.DownloadAdapterResponse(downloaded=True, fetched=fetched_to_proto(fetched))

    @_mapped
    async def AdapterText(self, request, context):
        try:
            files = await self.shard.adapter_text(request.store_digest, request.names)
        except AdapterUnavailableError as error:
            return pb.AdapterTextResponse(failure=failure_to_proto(error))
        return pb.AdapterTextResponse(
            files=[pb.TextFile(name=name, content=data) for name, data in files.items()]
        )

    @_mapped
    async def PrepareConstraint(self, request, context):
        content = content_from_proto(request.content) if request.HasField("content") else None
        try:
            await self.shard.prepare_constraint(constraint_from_proto(request.constraint), content)
        except ValidationError as error:
            return pb.PrepareConstraintResponse(refusal=str(error))
        return pb.PrepareConstraintResponse()

    @_mapped
    async def LoadAdapter(self, request, context):
        content = content_from_proto(request.content)
        try:
            report = await self.shard.prepare_adapter(request.adapter_index, content, request.epoch)
        except AdapterUnavailableError as error:
            return pb.LoadAdapterResponse(failure=failure_to_proto(error))
        return pb.LoadAdapterResponse(loaded=True, device_bytes=report.device_bytes)

    @_mapped
    async def OffloadAdapter(self, request, context):
        forget = [part_from_proto(part) for part in request.forget]
        await self.shard.release_adapter(request.adapter_index, forget, request.epoch)
        return pb.OffloadAdapterResponse(offloaded=True)

    async def _step(self, request: Any, reply_type: Any) -> Any:
        self.num_calls += 1
        outcome = await self.shard.step(step_from_proto(request), request.epoch)
        return outcome_to_proto(outcome, reply_type)


@contextlib.asynccontextmanager
async def running(
    servicer: FakeServicer, uri: str, options: Sequence[tuple[str, int]] = SERVER_OPTIONS
) -> AsyncIterator[str]:
    """Serve one rank and yield its address; an address with port 0 gets a free one."""
    server = grpc.aio.server(options=options)
    pb_grpc.add_LoraxServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(uri)
    await server.start()
    try:
        yield uri.removesuffix(":0") + f":{port}" if uri.endswith(":0") else uri
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def serve(
    shards: Sequence[FakeShard], folder: Path, jitter: random.Random | None = None
) -> AsyncIterator[list[str]]:
    """Serve one FakeShard per rank and yield their addresses."""
    uris = [f"unix:{folder}/rank-{rank}" for rank in range(len(shards))]
    async with contextlib.AsyncExitStack() as stack:
        for shard, uri in zip(shards, uris, strict=True):
            stack.push_async_callback(shard.close)
            await stack.enter_async_context(running(FakeServicer(shard, uris, jitter), uri))
        yield uris
