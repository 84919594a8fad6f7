"""The adapter calls of a shard's service beside its steps, over a toy engine with slots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.helpers.in_loop import in_loop
from tests.helpers.plans import make_spec
from tests.helpers.ready_adapters import LARGE, PART, QUICK, SPENT, ReadyAdapters
from tests.helpers.shard_rows import ShardRows
from tests.helpers.toy_adapters import make_engine
from tests.helpers.toy_paged_model import BLOCK_SIZE, expected_tokens

from lorax_contract.adapters import (
    AdapterContent,
    AdapterTiers,
    AdapterUnavailableError,
    LoadReport,
    Reason,
)
from lorax_contract.config import ShardConfig
from lorax_contract.step import AdapterHandle
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_router.shards.grpc_client import GrpcShardClient
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.adapters.rank_adapters import RankAdapters
from lorax_shard.rpc.queue import CommandQueue
from lorax_shard.rpc.server import ShardServer
from lorax_shard.store.store import AdapterStore

PROMPT = [40, 41, 42]


class Parts:
    """A shard in this process, and a client of it."""

    def __init__(
        self, lane: ReadyAdapters, client: GrpcShardClient, channel: grpc.aio.Channel
    ) -> None:
        self.lane, self.client, self.channel = lane, client, channel
        self.stub: Any = pb_grpc.LoraxServiceStub(channel)
        self.rows = ShardRows(client, iter(range(1, 999)), num_blocks=64, block_size=BLOCK_SIZE)

    async def prepare(self, handle: AdapterHandle) -> LoadReport:
        return await self.client.prepare_adapter(handle, AdapterContent(parts=(PART,)))


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Parts]:
    lane = ReadyAdapters()
    engine, _ = make_engine(lane)
    uri = f"unix:{folder}/shard"
    config = ShardConfig(
        model_dir="toy", model_id="toy", shard_uris=[uri], block_size=BLOCK_SIZE, epoch=3
    )
    commands = CommandQueue(3)
    anything: Any = lane
    store = AdapterStore(folder / "store", max_bytes=1 << 20)
    rank_adapters = RankAdapters(anything, HostCache(store, host_bytes=1 << 20), store, None)
    server = ShardServer(config, engine, commands, rank_adapters)
    await server.start()
    client = GrpcShardClient(uri)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(commands.close, 5.0)
        stack.push_async_callback(rank_adapters.close)
        stack.push_async_callback(server.stop, 1.0)
        stack.push_async_callback(client.close)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(uri))
        await client.info()
        yield Parts(lane, client, channel)


@in_loop
async def test_an_adapter_on_its_way_holds_no_step_up(tmp_path: Path) -> None:
    async with serving(tmp_path) as parts:
        await parts.prepare(QUICK)
        loading = asyncio.create_task(parts.prepare(LARGE))
        assert await asyncio.to_thread(parts.lane.inside.wait, 30)
        parts.rows.add(
            make_spec(1, PROMPT, max_new_tokens=12),
            make_spec(2, PROMPT, max_new_tokens=12, adapter=QUICK),
        )
        await parts.rows.run(8, activate=[QUICK])
        # All of that happened while it was loading, and so do other calls.
        assert not loading.done()
        assert parts.rows.rows[1].output == expected_tokens(PROMPT, 12)
        assert parts.rows.rows[2].output == [QUICK] * 12
        await parts.client.health()
        tiers: AdapterTiers = await parts.client.adapter_tiers([])
        assert set(tiers.device) == {QUICK}
        await parts.rows.step(deactivate=[QUICK])
        await parts.client.release_adapter(QUICK)
        parts.lane.gate.set()
        assert await loading == LoadReport(device_bytes=7, parse_s=0.5, copy_s=0.25)
        parts.rows.add(make_spec(3, PROMPT, max_new_tokens=2, adapter=LARGE))
        await parts.rows.run(8, activate=[LARGE])
        assert parts.rows.rows[3].output == [LARGE] * 2


@in_loop
async def test_a_row_that_comes_before_its_adapter_is_ready_fails_alone(tmp_path: Path) -> None:
    async with serving(tmp_path) as parts:
        loading = asyncio.create_task(parts.prepare(LARGE))
        assert await asyncio.to_thread(parts.lane.inside.wait, 30)
        parts.rows.add(make_spec(1, PROMPT, adapter=LARGE), make_spec(2, PROMPT))
        await parts.rows.run(8, activate=[LARGE])
        assert "not in effect" in (parts.rows.rows[1].text or "")
        assert parts.rows.rows[2].output == expected_tokens(PROMPT, 5)
        parts.lane.gate.set()
        await loading


@in_loop
async def test_failures_keep_their_reason_on_the_way(tmp_path: Path) -> None:
    async with serving(tmp_path) as parts:
        with pytest.raises(AdapterUnavailableError) as caught:
            await parts.prepare(SPENT)
        assert (caught.value.reason, caught.value.text) == (Reason.EVICTED, "gone")
        assert caught.value.retry_after_s == 3.0


@in_loop
async def test_calls_that_make_no_sense_are_refused_in_words(tmp_path: Path) -> None:
    two = pb.AdapterContent(parts=[pb.AdapterPart(content_digest="a"), pb.AdapterPart()])
    merge = pb.AdapterMerge(weights=[1.0, 1.0], combination="soup", majority_sign="total")
    soup = pb.AdapterContent(parts=two.parts, merge=merge)
    async with serving(tmp_path) as parts:
        names = pb.AdapterParameters(adapter_ids=["a", "b"])
        explained = await parts.stub.DownloadAdapter(
            pb.DownloadAdapterRequest(adapter_parameters=names, explain=True)
        )
        assert explained.failure.reason == "refused"
        assert "one adapter id at a time" in explained.failure.text
        for content, words in ((two, "a content has one part"), (soup, "soup")):
            request = pb.LoadAdapterRequest(adapter_index=5, epoch=3, content=content)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await parts.stub.LoadAdapter(request)
            assert words in (caught.value.details() or "")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not parts.lane


@in_loop
async def test_bytes_that_are_no_message_are_refused_in_words(tmp_path: Path) -> None:
    async with serving(tmp_path) as parts:
        for name in ("Prefill", "Info", "LoadAdapter"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await parts.channel.unary_unary(f"/generate.v1.LoraxService/{name}")(b"\x0a\x7f")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "not the message that this method takes" in (caught.value.details() or "")


@in_loop
async def test_numbers_that_name_nothing_are_refused_in_words(tmp_path: Path) -> None:
    row = pb.Request(id=1, tokenized_inputs=pb.TokenizedInputs(ids=PROMPT), output=99)
    step = pb.PrefillRequest(batch=pb.Batch(requests=[row]), epoch=3, seq=1, step=pb.Step())
    names = pb.AdapterParameters(adapter_ids=["a"])
    download = pb.DownloadAdapterRequest(adapter_parameters=names, adapter_source=99)
    prepare = pb.PrepareConstraintRequest(
        constraint=pb.Constraint(kind="CONSTRAINT_KIND_REGEX", text="a"),
        content=pb.AdapterContent(),
    )
    async with serving(tmp_path) as parts:
        for call, request, words in (
            (parts.stub.Prefill, step, "an output of the kind 99"),
            (parts.stub.DownloadAdapter, download, "source of the number 99"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request)
            assert words in (caught.value.details() or "")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the content is none" in (await parts.stub.PrepareConstraint(prepare)).refusal
