# ruff: noqa: N802 - the methods bear the names that the proto gives them.
"""The gRPC service of one rank: convert, run in the command queue, convert.

A call with ``step`` set speaks our plan and is answered in columns; a call
without it gets LoRAX's semantics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from lorax_contract.config import ShardConfig
from lorax_contract.errors import ValidationError
from lorax_contract.pooling import VectorFacts
from lorax_contract.step import ShardInfo, StepOutcome, StepPlan, WarmupSpec
from lorax_contract.tracing import SpanSink
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_proto.convert import (
    info_to_proto,
    outcome_to_proto,
    step_from_proto,
    warmup_from_proto,
)
from lorax_shard.adapters.rank_adapters import RankAdapters
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.launched import LaunchedStep
from lorax_shard.model.interface import SEQUENCE, TOKENS
from lorax_shard.model.vector_facts import read_vector_facts
from lorax_shard.rpc.adapter_calls import AdapterCalls
from lorax_shard.rpc.constraint_calls import ConstraintCalls
from lorax_shard.rpc.lorax_batches import BatchReply, LoraxBatches
from lorax_shard.rpc.lorax_requests import LoraxRequest, is_untokenized
from lorax_shard.rpc.pooled_calls import PooledCalls
from lorax_shard.rpc.queue import CommandQueue
from lorax_shard.rpc.row_spans import RowSpans

Context = grpc.aio.ServicerContext[Any, Any]
Reply = TypeVar("Reply", pb.PrefillResponse, pb.DecodeResponse)
Result = TypeVar("Result")


class LoraxServicer(pb_grpc.LoraxServiceServicer):
    """Answers for one rank; the engine is touched by the command queue's thread only."""

    def __init__(
        self,
        engine: Engine,
        commands: CommandQueue,
        config: ShardConfig,
        rank_adapters: RankAdapters | None = None,
        spans: SpanSink | None = None,
    ) -> None:
        # Rank 0 answers for all, and only it knows what became of rows.
        self._rows = None if spans is None or config.rank else RowSpans(spans, config.rank)
        self._adapters = AdapterCalls(engine, commands, rank_adapters)
        self._constraints = ConstraintCalls(engine, rank_adapters, rank=config.rank)
        self._engine = engine
        self._commands = commands
        self._config = config
        self._batches = LoraxBatches(
            engine,
            max_input_length=config.max_input_length,
            rank=config.rank,
        )
        vectors = vector_facts(engine, config)
        self._pooled = PooledCalls(engine, self._batches, vectors, config.max_input_length)

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """Say what the model is and what the shard can do."""
        info = shard_info(self._engine, self._config, self._commands.epoch)
        reply = info_to_proto(info, rank=self._config.rank)
        if request.with_adapters:
            reply.adapters.CopyFrom(await self._adapters.tiers(request))
        return reply

    async def Health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        """Answer if the engine's thread is alive."""
        self._commands.check_alive()
        return pb.HealthResponse()

    async def ServiceDiscovery(
        self, request: pb.ServiceDiscoveryRequest, context: Context
    ) -> pb.ServiceDiscoveryResponse:
        """Name the addresses of all ranks."""
        return pb.ServiceDiscoveryResponse(urls=self._config.shard_uris)

    async def Warmup(self, request: pb.WarmupRequest, context: Context) -> pb.WarmupResponse:
        """Size the KV pool."""
        spec = _warmup_spec(request)
        num_blocks = await self._run(request, lambda: self._warm_up(spec))
        return pb.WarmupResponse(
            max_supported_total_tokens=num_blocks * self._config.block_size,
            num_blocks=num_blocks,
        )

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.PrefillResponse:
        """Execute a step with new rows."""
        if request.HasField("step"):
            return await self._step(request, pb.PrefillResponse)
        cached = request.cached_batch.id if request.HasField("cached_batch") else None
        requests = await self._read(request.batch)
        reply = await self._run(
            request, lambda: self._batches.prefill(request.batch.id, requests, cached)
        )
        return _nested(reply, pb.PrefillResponse)

    async def _read(self, batch: pb.Batch) -> list[LoraxRequest]:
        """Read the requests of a batch; what takes time is done beside the steps.

        Those that came as text are tokenized, and schemas compiled.
        """
        if any(is_untokenized(each) for each in batch.requests):
            requests = await asyncio.to_thread(self._batches.read, batch)
        else:
            requests = self._batches.read(batch)
        for each in requests:
            if (constraint := each.new_row.spec.constraint) is not None and not self._config.rank:
                await self._constraints.compile(constraint)
        return requests

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.DecodeResponse:
        """Execute a step without new rows."""
        if request.HasField("step"):
            return await self._step(request, pb.DecodeResponse)
        batch_ids = [batch.id for batch in request.batches]
        reply = await self._run(request, lambda: self._batches.decode(batch_ids))
        return _nested(reply, pb.DecodeResponse)

    async def FilterBatch(
        self, request: pb.FilterBatchRequest, context: Context
    ) -> pb.FilterBatchResponse:
        """Keep the named requests of a cached batch."""
        keep = list(request.request_ids)
        batch = await self._run(request, lambda: self._batches.filter(request.batch_id, keep))
        return pb.FilterBatchResponse(batch=batch)

    async def ClearCache(
        self, request: pb.ClearCacheRequest, context: Context
    ) -> pb.ClearCacheResponse:
        """Drop one cached batch, or all rows, or all that another router has left."""
        if request.HasField("next_epoch"):
            self._commands.begin(request.next_epoch)
            await self._commands.run(self._let_all_go)
            self._adapters.forget_prepared()
            return pb.ClearCacheResponse()
        batch_id = request.id if request.HasField("id") else None
        await self._run(request, lambda: self._batches.clear(batch_id))
        return pb.ClearCacheResponse()

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Make a vector of each text of a batch."""
        requests = await asyncio.to_thread(self._pooled.read_embed, request.batch)
        return await self._commands.run(lambda: self._pooled.embed(requests))

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        """Classify each text of a batch by the model's own head."""
        requests = await asyncio.to_thread(self._pooled.read_classify, request.batch)
        return await self._commands.run(lambda: self._pooled.classify(requests))

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Context
    ) -> pb.DownloadAdapterResponse:
        """Fetch and verify an adapter; the base model needs none."""
        return await self._adapters.download(request)

    async def AdapterText(
        self, request: pb.AdapterTextRequest, context: Context
    ) -> pb.AdapterTextResponse:
        """Return an adapter's own tokenizer and template files."""
        return await self._adapters.text(request)

    async def ReadAdapter(
        self, request: pb.ReadAdapterRequest, context: Context
    ) -> pb.ReadAdapterResponse:
        """Return a piece of a stored adapter for a rank with a store of its own."""
        return await self._adapters.read(request)

    async def PrepareConstraint(
        self, request: pb.PrepareConstraintRequest, context: Context
    ) -> pb.PrepareConstraintResponse:
        """Compile what outputs will be bound to, beside the steps."""
        self._commands.check_epoch(request.epoch if request.HasField("epoch") else None)
        return await self._constraints.prepare(request)

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        """Make an adapter ready; the base model always is."""
        self._commands.check_epoch(request.epoch if request.HasField("epoch") else None)
        return await self._adapters.load(request)

    async def OffloadAdapter(
        self, request: pb.OffloadAdapterRequest, context: Context
    ) -> pb.OffloadAdapterResponse:
        """Free what LoadAdapter made; the base model never leaves."""
        self._commands.check_epoch(request.epoch if request.HasField("epoch") else None)
        return await self._adapters.offload(request)

    async def _run(
        self,
        request: pb.PrefillRequest
        | pb.DecodeRequest
        | pb.FilterBatchRequest
        | pb.ClearCacheRequest
        | pb.WarmupRequest,
        command: Callable[[], Result],
    ) -> Result:
        """Run a command in the place of the queue that the request asks for."""
        epoch = request.epoch if request.HasField("epoch") else None
        seq = request.seq if request.HasField("seq") else None
        kind = type(request).__name__
        return await self._commands.run(command, epoch=epoch, seq=seq, kind=kind)

    async def _step(
        self, request: pb.PrefillRequest | pb.DecodeRequest, reply_type: type[Reply]
    ) -> Reply:
        if not request.HasField("seq"):
            raise ValidationError("a step must name its epoch and seq")
        plan = step_from_proto(request)
        arrived = time.perf_counter_ns()
        outcome, queue_ns = await self._commands.run(
            lambda: self._launch(plan, arrived),
            finish=self._collect,
            epoch=request.epoch if request.HasField("epoch") else None,
            seq=request.seq,
            kind="step",
        )
        reply = outcome_to_proto(outcome, reply_type)
        reply.timing.queue_ns = queue_ns
        return reply

    def _launch(self, plan: StepPlan, arrived_ns: int) -> tuple[LaunchedStep, int]:
        queue_ns = time.perf_counter_ns() - arrived_ns
        if self._rows is not None:
            self._rows.launched(plan)
        return self._engine.launch(plan), queue_ns

    def _collect(self, launched: tuple[LaunchedStep, int]) -> tuple[StepOutcome, int]:
        step, queue_ns = launched
        outcome = self._engine.collect(step)
        if self._rows is not None:
            self._rows.collected(outcome)
        if self._config.rank:  # rank 0 answers for all
            outcome = StepOutcome(
                outcome.seq, forward_ns=outcome.forward_ns, total_ns=outcome.total_ns
            )
        return outcome, queue_ns

    def _let_all_go(self) -> None:
        if self._rows is not None:
            self._rows.forget()
        self._batches.clear(None)
        if self._engine.adapters is not None:
            self._engine.adapters.clear()

    def _warm_up(self, spec: WarmupSpec) -> int:
        self._batches.clear(None)
        num_blocks = self._engine.warm_up(spec)
        self._batches.max_step_tokens = spec.max_step_tokens
        return num_blocks


def shard_info(engine: Engine, config: ShardConfig, epoch: int) -> ShardInfo:
    """Return what a rank says of itself, which serves the calls of an epoch."""
    model = engine.model
    return ShardInfo(
        epoch=epoch,
        world_size=config.world_size,
        model_type=model.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        device_type=model.device.type,
        block_size=config.block_size,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        num_blocks=engine.num_blocks,
        max_depth=config.max_depth,
        speculative_tokens=config.speculative_tokens,
        window_size=model.window_size,
        attention_backend=model.attention_backend,
        linear_backend=model.linear_backend,
        elementwise_backend=model.elementwise_backend,
        lora_backend=model.lora_backend if engine.adapters is not None else "",
        adapter_bytes=engine.memory.adapter_bytes,
        num_host_blocks=engine.num_host_blocks,
        block_move_s=engine.block_move_s,
        is_encoder=model.is_encoder,
        generates=model.generates,
        head=model.head(SEQUENCE) or model.head(TOKENS),
        vectors=vector_facts(engine, config),
        # The ranks' pools have as many blocks as the fullest rank has room for.
        memory=engine.memory.with_blocks(engine.num_blocks).items,
        shard_uris=tuple(config.shard_uris),
    )


def vector_facts(engine: Engine, config: ShardConfig) -> VectorFacts:
    """Return how vectors are made of prompts, where nothing else is said."""
    return read_vector_facts(Path(config.model_dir), is_encoder=engine.model.is_encoder)


def _warmup_spec(request: pb.WarmupRequest) -> WarmupSpec:
    """Return the largest step; a LoRAX caller shows it by a batch instead of naming its rows."""
    spec = warmup_from_proto(request)
    if spec.max_step_tokens < 1 or spec.max_input_length < 1:
        raise ValidationError("Warmup needs max_input_length and max_prefill_tokens above 0")
    return replace(spec, max_rows=spec.max_rows or max(1, len(request.batch.requests)))


def _nested(reply: BatchReply, reply_type: type[Reply]) -> Reply:
    return reply_type(generations=reply.generations, batch=reply.batch)
