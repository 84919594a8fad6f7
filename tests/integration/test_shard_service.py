"""The shard's service in our own terms: steps over gRPC, in sequence, over the toy engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import stat
import threading

import grpc
import pytest
from tests.helpers.toy_paged_model import expected_tokens, make_engine, make_plan, new_row

from lorax_contract.config import ShardConfig
from lorax_contract.errors import LoraxError, StaleEpochError, StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import FinishCode, WarmupSpec
from lorax_proto import generate_pb2 as pb
from lorax_proto import generate_pb2_grpc as pb_grpc
from lorax_proto.convert import outcome_from_proto, step_to_proto
from lorax_router.shards.group import ShardGroup
from lorax_router.shards.grpc_client import GrpcShardClient
from lorax_shard.rpc.queue import CommandQueue
from lorax_shard.rpc.server import ShardServer

PROMPT, OTHER = [7, 9, 11, 13, 15, 17, 19], [40, 41, 42]
EPOCH = 4


@contextlib.asynccontextmanager
async def serving(folder, *, world_size=1, gap_timeout_s=30.0, uris=None):
    """Yield (addresses, engines, queues) of ranks that are all in this process."""
    uris = uris or [f"unix:{folder}/rank-{rank}" for rank in range(world_size)]
    engines, queues = [], []
    async with contextlib.AsyncExitStack() as stack:
        for rank in range(world_size):
            config = ShardConfig(
                epoch=EPOCH,
                model_dir="toy",
                model_id="toy",
                rank=rank,
                world_size=world_size,
                rendezvous="unused",
                shard_uris=uris,
                block_size=4,
            )
            engines.append(make_engine())
            queues.append(CommandQueue(EPOCH, gap_timeout_s=gap_timeout_s))
            server = ShardServer(config, engines[-1], queues[-1])
            await server.start()
            stack.push_async_callback(queues[-1].close, 5.0)
            stack.push_async_callback(server.stop, 1.0)
        yield uris, engines, queues


@contextlib.asynccontextmanager
async def raw_stub(uri):
    async with grpc.aio.insecure_channel(uri) as channel:
        yield pb_grpc.LoraxServiceStub(channel)


def send(stub, plan, epoch=EPOCH):
    """Send a plan as one call and return its future outcome."""

    async def call():
        request = step_to_proto(plan, epoch)
        rpc = stub.Prefill if plan.new_rows else stub.Decode
        return outcome_from_proto(await rpc(request), plan.seq)

    return asyncio.ensure_future(call())


def plans_of_two_rows(num_decodes):
    """Return the plans that take two rows in and decode them."""
    rows = [new_row(1, PROMPT, max_new_tokens=50), new_row(2, OTHER, max_new_tokens=50)]
    blocks = list(range(1, 31))
    first = make_plan(1, [(1, 7, blocks[:15]), (2, 3, blocks[15:])], new=rows)
    return [first] + [make_plan(seq, [(1, 1, []), (2, 1, [])]) for seq in range(2, num_decodes + 2)]


def test_calls_that_arrive_out_of_order_are_executed_in_sequence(tmp_path):
    async def main():
        async with serving(tmp_path) as (uris, _, _), raw_stub(uris[0]) as stub:
            plans = plans_of_two_rows(20)
            calls = {}
            for plan in random.Random(3).sample(plans, len(plans)):
                calls[plan.seq] = send(stub, plan)
                await asyncio.sleep(0.002)
            tokens = {1: [], 2: []}
            for seq in sorted(calls):
                outcome = await calls[seq]
                for request_id, token_id in zip(outcome.row_ids, outcome.tokens.ids, strict=True):
                    tokens[request_id].append(token_id)
        assert tokens == {1: expected_tokens(PROMPT, 21), 2: expected_tokens(OTHER, 21)}

    asyncio.run(main())


def test_a_repeated_seq_gets_the_same_reply_and_computes_nothing(tmp_path):
    async def main():
        async with serving(tmp_path) as (uris, engines, _), raw_stub(uris[0]) as stub:
            first, second = plans_of_two_rows(1)
            replies = [await send(stub, plan) for plan in (first, second, second, first)]
            num_passes = len(engines[0].model.passes)
        assert num_passes == 2
        assert replies[1] == replies[2]
        assert replies[0] == replies[3]

    asyncio.run(main())


def test_stale_epochs_and_open_gaps_are_said_in_words(tmp_path):
    async def main():
        async with (
            serving(tmp_path, gap_timeout_s=0.01) as (uris, engines, _),
            raw_stub(uris[0]) as stub,
        ):
            first, second = plans_of_two_rows(1)
            no_seq = pb.DecodeRequest(step=pb.Step(row_ids=[1], num_tokens=[1]))
            for call, status, words in (
                (send(stub, first, epoch=3), grpc.StatusCode.FAILED_PRECONDITION, "epoch 3"),
                (send(stub, second), grpc.StatusCode.INTERNAL, "waited 0.01 s for seq 1"),
                (stub.Decode(no_seq), grpc.StatusCode.INVALID_ARGUMENT, "epoch and seq"),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is status
                assert words in caught.value.details()
            assert not engines[0].model.passes

    asyncio.run(main())


def test_a_bad_row_fails_alone_over_the_wire(tmp_path):
    async def main():
        async with serving(tmp_path) as (uris, _, _):
            client = GrpcShardClient(uris[0])
            await client.info()
            rows = [new_row(1, PROMPT), new_row(2, [1, 999])]
            outcome = await client.step(make_plan(1, [(1, 7, [1, 2]), (2, 2, [3])], new=rows))
            await client.close()
        assert dict(zip(outcome.row_ids, outcome.finish, strict=True)) == {
            1: FinishCode.RUNNING,
            2: FinishCode.ERROR,
        }
        assert "vocabulary" in outcome.details[2].error_text
        assert outcome.tokens.ids == expected_tokens(PROMPT, 1)

    asyncio.run(main())


def test_health_and_info_do_not_wait_for_a_step(tmp_path):
    async def main():
        async with serving(tmp_path) as (uris, engines, _):
            client = GrpcShardClient(uris[0])
            assert (await client.info()).epoch == EPOCH
            gate, forward = threading.Event(), engines[0].model.forward
            engines[0].model.forward = lambda *args: gate.wait(20) and forward(*args)
            step = asyncio.ensure_future(client.step(plans_of_two_rows(0)[0]))
            await asyncio.sleep(0.05)
            await client.health()
            assert (await client.info()).num_blocks == 64
            assert not step.done()
            gate.set()
            assert sorted((await step).row_ids) == [1, 2]
            await client.close()

    asyncio.run(main())


def test_health_fails_when_the_engines_thread_is_dead(tmp_path):
    def die(*_args):
        raise SystemExit(1)

    async def main():
        async with serving(tmp_path) as (uris, engines, queues):
            client = GrpcShardClient(uris[0])
            await client.info()
            engines[0].launch = die
            with pytest.raises(LoraxError):
                await client.step(plans_of_two_rows(0)[0])
            await asyncio.to_thread(queues[0]._worker.join, 5.0)
            with pytest.raises(LoraxError, match="thread has ended"):
                await client.health()
            await client.close()

    asyncio.run(main())


def test_what_is_no_error_of_ours_tells_the_caller_nothing_of_the_inside(tmp_path):
    def broken(*_args):
        raise KeyError("secret detail")

    async def main():
        async with serving(tmp_path) as (uris, engines, _), raw_stub(uris[0]) as stub:
            engines[0].launch = broken
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await send(stub, plans_of_two_rows(0)[0])
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in caught.value.details()

    asyncio.run(main())


def test_of_two_ranks_one_answers(tmp_path):
    async def main():
        async with serving(tmp_path, world_size=2) as (uris, _, _):
            group = await ShardGroup.connect(uris[0])
            spec = WarmupSpec(
                max_input_length=32, max_total_tokens=48, max_step_tokens=16, max_rows=4
            )
            assert await group.warmup(spec) == 64
            tokens = {1: [], 2: []}
            for plan in plans_of_two_rows(5):
                outcome = await group.step(plan)
                for request_id, token_id in zip(outcome.row_ids, outcome.tokens.ids, strict=True):
                    tokens[request_id].append(token_id)
            await group.clear(7)
            after = await group.step(make_plan(8, [(1, 1, [])]))
            await group.close()
        assert tokens == {1: expected_tokens(PROMPT, 6), 2: expected_tokens(OTHER, 6)}
        assert after.finish == [FinishCode.ERROR]

    asyncio.run(main())


def test_an_epoch_is_bound_to_its_shard(tmp_path):
    async def main():
        async with serving(tmp_path) as (uris, _, _):
            client = GrpcShardClient(uris[0])
            client._epoch = 3
            with pytest.raises(StaleEpochError):
                await client.step(plans_of_two_rows(0)[0])
            await client.close()

    asyncio.run(main())


def test_another_router_takes_a_shard_over(tmp_path):
    """What the first one left is gone, its late calls are refused, and the pool is the same."""

    async def main():
        async with serving(tmp_path) as (uris, engines, _):
            old, new = GrpcShardClient(uris[0]), GrpcShardClient(uris[0])
            plans = plans_of_two_rows(3)
            first = [(await old.step(plan)).tokens.ids for plan in plans[:2]]
            passes, pool = len(engines[0].model.passes), engines[0].num_blocks
            await new.info()
            await new.take_over(EPOCH + 1)
            assert not len(engines[0].batch)
            spec = WarmupSpec(
                max_input_length=32, max_total_tokens=48, max_step_tokens=16, max_rows=4
            )
            assert await new.warmup(spec) == pool
            # Asked for the same as before, it keeps what is there.
            assert len(engines[0].model.passes) == passes
            assert (await new.info()).epoch == EPOCH + 1
            with pytest.raises(StaleEpochError):
                await old.step(plans[2])
            assert [(await new.step(plan)).tokens.ids for plan in plans[:2]] == first
            await old.close()
            await new.close()

    asyncio.run(main())


def test_a_socket_is_for_this_user_alone_whatever_folder_it_is_in(tmp_path):
    async def main():
        async with serving(tmp_path) as (uris, _, _):
            path = tmp_path / uris[0].rpartition("/")[2]
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        # Files that are written later are like those of any process.
        (tmp_path / "file").touch()
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644

    mask = os.umask(0o022)
    try:
        asyncio.run(main())
    finally:
        os.umask(mask)


def test_a_free_port_may_be_asked_for(tmp_path):
    async def main():
        queue = CommandQueue(EPOCH)
        config = ShardConfig(model_dir="toy", model_id="toy", shard_uris=["127.0.0.1:0"])
        server = ShardServer(config, make_engine(), queue)
        await server.start()
        async with raw_stub(server.uri) as stub:
            await stub.Health(pb.HealthRequest())
        await server.stop(1.0)
        await queue.close(5.0)
        assert server.uri.startswith("127.0.0.1:")
        assert not server.uri.endswith(":0")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "missing" / "shard", "folder does not exist"),
        (lambda folder: folder / ("x" * 120), "longer than"),
        (lambda folder: folder / "file", "no socket"),
    ],
)
def test_addresses_that_cannot_be_used_are_said_in_words(tmp_path, make, words):
    (tmp_path / "file").write_text("mine")

    async def main():
        with pytest.raises(StartupError, match=words) as caught:
            async with serving(tmp_path, uris=[f"unix:{make(tmp_path)}"]):
                pass
        assert caught.value.exit_code is ExitCode.SOCKET_FAILED
        assert (tmp_path / "file").read_text() == "mine"

    asyncio.run(main())
