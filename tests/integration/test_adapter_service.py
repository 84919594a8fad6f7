"""The adapter calls of a shard's service beside its steps, over a toy engine with slots."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.helpers.in_loop import in_loop
from tests.helpers.plans import make_spec
from tests.helpers.shard_rows import ShardRows
from tests.helpers.toy_adapters import ToyAdapter, ToyPrepared, make_engine
from tests.helpers.toy_paged_model import BLOCK_SIZE, expected_tokens

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
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

QUICK, LARGE, SPENT = AdapterHandle(101), AdapterHandle(102), AdapterHandle(103)
PROMPT = [40, 41, 42]
PART = AdapterPart("content", "store")


class ReadyAdapters(ToyPrepared):
    """Prepares an adapter that favours its handle; the LARGE one while the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.gate = threading.Event(), threading.Event()

    def prepare(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        if handle == SPENT:
            raise AdapterUnavailableError(Reason.EVICTED, "gone", retry_after_s=3.0)
        if handle == LARGE:
            self.inside.set()
            assert self.gate.wait(30)
        self[handle] = ToyAdapter(int(handle))
        return LoadReport(device_bytes=7, parse_s=0.5, copy_s=0.25)

    def release(self, handle: AdapterHandle) -> None:
        self.pop(handle, None)

    def device_tier(self) -> dict[AdapterHandle, tuple[str, int]]:
        return dict.fromkeys(self, ("content", 7))


class Parts:
    """A shard in this process, and a client of it."""

    def __init__(self, lane: ReadyAdapters, client: GrpcShardClient, stub: Any) -> None:
        self.lane, self.client, self.stub = lane, client, stub
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
        yield Parts(lane, client, pb_grpc.LoraxServiceStub(channel))


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
