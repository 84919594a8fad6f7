"""GrpcShardClient and ShardGroup.connect over real servers: addresses, breaks, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import fields

import pytest
from tests.helpers.contents import content
from tests.helpers.fake_shard_server import FakeServicer, running, serve
from tests.helpers.in_loop import in_loop
from tests.helpers.plans import make_plan, make_spec

from lorax_contract.adapters import AdapterQuery, AdapterRef, AdapterUnavailableError, Reason
from lorax_contract.errors import (
    GenerationError,
    ShardError,
    ShardUnavailableError,
    StaleEpochError,
    ValidationError,
)
from lorax_contract.step import AdapterHandle
from lorax_proto import generate_pb2 as pb
from lorax_proto import mutual_tls
from lorax_proto.transport import CLIENT_OPTIONS, SERVER_OPTIONS
from lorax_router.shards.fake.shard import FakeModel, FakeShard, expected_tokens
from lorax_router.shards.group import ShardGroup
from lorax_router.shards.grpc_client import CallTimeouts, GrpcShardClient

QUICK = CallTimeouts(info_s=5, health_s=0.2, step_s=5, reconnect_s=0.2)


@in_loop
async def test_the_group_finds_all_ranks_from_the_first(tmp_path):
    shards = [FakeShard(rank=rank, world_size=3, num_blocks=9 - rank) for rank in range(3)]
    async with serve(shards, tmp_path) as uris:
        group = await ShardGroup.connect(uris[0])
        info = await group.info()
        assert info.shard_uris == tuple(uris)
        assert info.world_size == 3
        await group.close()


@in_loop
async def test_a_shard_on_tcp_is_reached_whatever_proxy_the_environment_names(monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    shard = FakeShard()
    async with running(FakeServicer(shard, []), "127.0.0.1:0") as uri:
        group = await ShardGroup.connect(uri)
        assert (await group.info()).shard_uris == (uri,)
        await group.close()


@in_loop
async def test_ranks_of_two_incarnations_are_no_group(tmp_path):
    shards = [FakeShard(rank=rank, world_size=2, epoch=rank + 1) for rank in range(2)]
    async with serve(shards, tmp_path) as uris:
        with pytest.raises(ShardError, match="differ in epoch: 1, 2"):
            await ShardGroup.connect(uris[0])


@in_loop
async def test_a_step_in_flight_survives_a_broken_connection(tmp_path):
    shard = FakeShard()
    uri = f"unix:{tmp_path}/shard"
    client = GrpcShardClient(uri, timeouts=CallTimeouts(reconnect_s=10))
    spec = make_spec(1, max_new_tokens=9, ignore_eos=True)
    async with running(FakeServicer(shard, [uri]), uri):
        await client.info()
        shard.hold()
        answer = asyncio.create_task(client.step(make_plan(1, [(1, 3, [0])], [spec])))
        await shard.arrived(1)
    servicer = FakeServicer(shard, [uri])
    async with running(servicer, uri):
        shard.let_go()
        assert (await answer).tokens.ids == expected_tokens(spec)[:1]
        assert (len(shard.steps), servicer.num_calls) == (1, 1)
        await client.close()


@in_loop
async def test_a_repeated_call_cannot_reach_the_next_incarnation(tmp_path):
    shard = FakeShard(epoch=5)
    uri = f"unix:{tmp_path}/shard"
    client = GrpcShardClient(uri, timeouts=CallTimeouts(reconnect_s=10))
    async with running(FakeServicer(shard, [uri]), uri):
        await client.info()
        shard.hold()
        answer = asyncio.create_task(client.step(make_plan(1)))
        await shard.arrived(1)
    shard.restart()
    shard.let_go()
    async with running(FakeServicer(shard, [uri]), uri):
        with pytest.raises(StaleEpochError, match="epoch 5 is over"):
            await answer
        assert shard.steps == []
        await client.close()


@in_loop
async def test_a_shard_that_is_gone_is_unavailable_and_named(tmp_path):
    uri = f"unix:{tmp_path}/nobody"
    client = GrpcShardClient(uri, timeouts=QUICK)
    for call in (client.info, client.health, lambda: client.step(make_plan(1))):
        with pytest.raises(ShardUnavailableError, match="nobody"):
            await call()
    await client.close()
    with pytest.raises(ShardUnavailableError, match="nobody"):
        await ShardGroup.connect(uri, timeouts=QUICK)


@in_loop
async def test_one_rank_that_is_gone_is_named_by_its_number(tmp_path):
    shards = [FakeShard(rank=rank, world_size=2) for rank in range(2)]
    uris = [f"unix:{tmp_path}/rank-{rank}" for rank in range(2)]
    async with running(FakeServicer(shards[0], uris), uris[0]):
        async with running(FakeServicer(shards[1], uris), uris[1]):
            group = await ShardGroup.connect(uris[0], timeouts=QUICK)
        for call in (group.health, lambda: group.step(make_plan(1))):
            with pytest.raises(ShardUnavailableError, match="rank 1 of 2"):
                await call()
        await group.close()


@in_loop
async def test_a_call_that_is_not_answered_in_time_counts_as_lost(tmp_path):
    class Mute(FakeServicer):
        async def Health(self, request, context):
            await asyncio.Event().wait()

    async with running(Mute(FakeShard(), []), f"unix:{tmp_path}/shard") as uri:
        client = GrpcShardClient(uri, timeouts=QUICK)
        with pytest.raises(ShardUnavailableError, match="no answer within .* s"):
            await client.health()
        await client.close()


@in_loop
async def test_a_fetch_waits_its_turn_for_longer_than_any_call_may_take(tmp_path):
    """Only the shard knows how long it waited for others, and how long it took."""
    shard = FakeShard()
    shard.fetch_delay_s = 0.5
    each = CallTimeouts(**{field.name: 0.1 for field in fields(CallTimeouts)})
    async with running(FakeServicer(shard, []), f"unix:{tmp_path}/shard") as uri:
        client = GrpcShardClient(uri, timeouts=each)
        query = AdapterQuery(ref=AdapterRef.of("local", "a"))
        assert (await client.fetch_adapter(query)).version == "1"
        await client.close()


@in_loop
async def test_the_step_is_a_prefill_only_when_rows_enter(tmp_path):
    calls = []

    class Listening(FakeServicer):
        async def Prefill(self, request, context):
            calls.append(("Prefill", request.seq, request.epoch))
            return await super().Prefill(request, context)

        async def Decode(self, request, context):
            calls.append(("Decode", request.seq, request.epoch))
            return await super().Decode(request, context)

    async with running(Listening(FakeShard(epoch=4), []), f"unix:{tmp_path}/shard") as uri:
        client = GrpcShardClient(uri)
        spec = make_spec(1, ignore_eos=True)
        await client.step(make_plan(1, [(1, 3, [0])], [spec]))
        await client.step(make_plan(2, [(1, 1, [])]))
        await client.step(make_plan(3, [(1, 1, [1]), (2, 3, [2])], [make_spec(2)]))
        assert calls == [("Prefill", 1, 4), ("Decode", 2, 4), ("Prefill", 3, 4)]
        await client.close()


@in_loop
async def test_large_steps_pass(tmp_path):
    """More than gRPC's default limit of 4 MB comes back."""
    prompt = [900] * 30_000
    model = FakeModel(text_of=lambda _: "x" * 200)
    spec = make_spec(1, prompt, max_new_tokens=1, prompt_logprobs=True)
    async with serve([FakeShard(model, block_size=len(prompt))], tmp_path) as uris:
        client = GrpcShardClient(uris[0])
        outcome = await client.step(make_plan(1, [(1, len(prompt), [0])], [spec]))
        assert outcome.details[1].prompt_tokens.ids == prompt
        await client.close()


@in_loop
async def test_a_client_that_is_closed_says_so(tmp_path):
    async with serve([FakeShard()], tmp_path) as uris:
        client = GrpcShardClient(uris[0], timeouts=QUICK)
        await client.info()
        await client.close()
        with pytest.raises(ShardUnavailableError, match="closed"):
            await client.step(make_plan(1))


@in_loop
async def test_closing_ends_calls_in_flight(tmp_path):
    shard = FakeShard()
    async with serve([shard], tmp_path) as uris:
        client = GrpcShardClient(uris[0], timeouts=QUICK)
        shard.hold()
        await client.info()
        answer = asyncio.create_task(client.step(make_plan(1)))
        await shard.arrived(1)
        await client.close()
        with pytest.raises((ShardUnavailableError, asyncio.CancelledError)):
            await answer


@in_loop
async def test_a_shard_without_our_fields_is_refused(tmp_path):
    """A LoRAX shard answers Info without an epoch: nothing is sent to it."""

    class Lorax(FakeServicer):
        async def Info(self, request, context):
            return pb.InfoResponse(dtype="float16", block_size=16)

    shard = FakeShard()
    async with running(Lorax(shard, []), f"unix:{tmp_path}/shard") as uri:
        client = GrpcShardClient(uri, timeouts=QUICK)
        with pytest.raises(ShardError, match="epoch"):
            await client.info()
        with pytest.raises(ShardError, match="epoch"):
            await client.prepare_adapter(AdapterHandle(1), content("digest"))
        assert shard.prepared == {}
        await client.close()


@pytest.mark.parametrize("error", [GenerationError("odd"), ValidationError("odd"), KeyError("odd")])
@in_loop
async def test_a_step_answered_with_any_status_is_an_error_of_the_shard(tmp_path, error):
    """Whatever the status: the loop counts the step as failed, and the router ends in words."""
    shard = FakeShard()
    shard.fail_step(1, error)
    async with serve([shard], tmp_path) as uris:
        client = GrpcShardClient(uris[0], timeouts=QUICK)
        with pytest.raises(ShardError, match="odd"):
            await client.step(make_plan(1))
        await client.close()


@in_loop
async def test_texts_that_left_the_disk_say_so(tmp_path):
    class Emptied(FakeShard):
        async def adapter_text(self, store_digest, names):
            raise AdapterUnavailableError(Reason.EVICTED, "fetch it again")

    async with serve([Emptied()], tmp_path) as uris:
        client = GrpcShardClient(uris[0], timeouts=QUICK)
        with pytest.raises(AdapterUnavailableError, match="fetch it again") as caught:
            await client.adapter_text("digest", ["tokenizer.json"])
        assert caught.value.reason is Reason.EVICTED
        await client.close()


def quicker(options: Sequence[tuple[str, int]], factor: int) -> list[tuple[str, int]]:
    """Return channel options with all that decides about pings so much faster."""
    return [
        (name, value // factor if "keepalive" in name or "ping_interval" in name else value)
        for name, value in options
    ]


async def silent_call(seconds: float, uri: str, server_options: Sequence[tuple[str, int]]) -> int:
    """Have a call answered after so many seconds; return how often it was sent."""
    servicer = FakeServicer(FakeShard(step_delay_s=seconds), [])
    async with running(servicer, uri, server_options):
        client = GrpcShardClient(uri, timeouts=CallTimeouts(step_s=seconds + 60))
        await client.step(make_plan(1))
        await client.close()
    return servicer.num_calls


@in_loop
async def test_a_silent_call_outlasts_the_pings_meanwhile(tmp_path, monkeypatch):
    """One ping a second: a server that did not expect them would end the connection at the fifth."""
    monkeypatch.setattr(mutual_tls, "CLIENT_OPTIONS", quicker(CLIENT_OPTIONS, 30))
    assert await silent_call(7.0, f"unix:{tmp_path}/shard", quicker(SERVER_OPTIONS, 30)) == 1


@pytest.mark.slow
def test_a_call_may_be_silent_for_minutes(tmp_path):
    """The same at real speed."""
    uri = f"unix:{tmp_path}/shard"
    assert asyncio.run(silent_call(200.0, uri, SERVER_OPTIONS)) == 1
