"""Engines of several ranks under one scheduler: as one, whatever reaches whom when."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop
from tests.helpers.oracle import FREE, Oracle
from tests.helpers.rank_shards import Carrier, LocalRank
from tests.helpers.thread_ranks import Meeting
from tests.helpers.toy_adapters import ToyAdapter, using
from tests.helpers.toy_paged_model import BLOCK_SIZE, NAN_ID, POISON_ID, new_row

from lorax_contract.errors import UnhealthyError
from lorax_contract.step import AdapterHandle, FinishCode, LogitBias, RequestSpec, WarmupSpec
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.scheduler import Scheduler
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.service.engine.port import TokenChunk
from lorax_router.shards.group import ShardGroup
from lorax_shard.engine.drafter import Drafter, DraftSettings

# The longest request takes nearly all, so that others are preempted.
NUM_BLOCKS = 10
NUM_ADAPTERS, NUM_SLOTS = 5, 2
# Of each group that has served, in order.
PREEMPTIONS: list[int] = []
# The toy's texts are random, so that strings this short are met soon.
STOPS = ("a", "th", "e r", "on", "s")


def adapter_of(rank: int, handle: AdapterHandle) -> ToyAdapter:
    """Return an adapter, the same on all ranks."""
    return ToyAdapter(favourite=20 + handle, bonus=1.5)


def specs(seed: int) -> list[RequestSpec]:
    """Return requests of all kinds, over base and adapters."""
    rng = random.Random(seed)
    made = []
    for number in range(1, 25):
        sampling = {"do_sample": True, "seed": number, "temperature": 1.3} if number % 2 else {}
        if number % 4 == 1:
            sampling |= {"top_p": 0.9, "top_k": 90, "frequency_penalty": 0.3}
        if number % 3 == 0:
            sampling["num_alternatives"] = 3
        if number % 7 == 0:
            sampling |= {"prompt_logprobs": True, "num_prompt_alternatives": 2}
        if number % 5 == 0:
            sampling |= {"logit_bias": LogitBias((40, 41), (3.0, -100.0)), "watermark": True}
        row = new_row(
            number,
            [rng.randrange(1, 300) for _ in range(rng.randrange(1, 20))],
            # Every seventh asks for its prompt alone.
            max_new_tokens=0 if number % 7 == 0 else rng.randrange(1, 18),
            min_new_tokens=3 * (number % 4 == 2),
            stop_sequences=STOPS if number % 4 == 0 else (),
            **sampling,
        )
        made.append(using(row, number % (NUM_ADAPTERS + 1)).spec)
    return made


class World:
    """A router's engine loop over ranks in this process."""

    def __init__(
        self,
        world_size: int,
        seed: int,
        adapters: Callable[..., ToyAdapter],
        num_host_blocks: int = 0,
        make_drafter: Callable[[], Drafter] | None = None,
    ) -> None:
        meeting = self.meeting = Meeting(world_size)
        # The host memory of the last rank is the smallest.
        self.ranks = [
            LocalRank(
                meeting, rank, seed=seed, num_blocks=NUM_BLOCKS, adapter_of=adapters,
                swap_bytes=16 * BLOCK_SIZE * (num_host_blocks + world_size - 1 - rank)
                * bool(num_host_blocks),
                drafter=None if make_drafter is None else make_drafter(),
            )
            for rank in range(world_size)
        ]  # fmt: skip
        self.group = ShardGroup(self.ranks)
        self.scheduler = Scheduler(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_step_tokens=10,
            max_rows=6,
            depth=3,
            num_host_blocks=num_host_blocks,
            draft_tokens=0 if make_drafter is None else 3,
            adapters=AdapterTable(max_resident=NUM_SLOTS, cycle_time_s=0.05),
        )
        for number in range(1, NUM_ADAPTERS + 1):
            self.scheduler.adapters.add(AdapterHandle(number), 1)
        self.loop = EngineLoop(self.group, self.scheduler, adapters=Carrier(self.group))

    async def warm_up(self) -> None:
        spec = WarmupSpec(max_input_length=32, max_total_tokens=48, max_step_tokens=16, max_rows=4)
        assert await self.group.warmup(spec) == NUM_BLOCKS

    async def answer(self, spec: RequestSpec, *, leave_after: int = 0) -> list[TokenChunk]:
        """Return the chunks of a request, or leave after some."""
        stream = self.loop.submit(spec)
        chunks: list[TokenChunk] = []
        async for chunk in stream:
            chunks.append(chunk)
            if leave_after and len(chunks) == leave_after:
                await stream.aclose()
        return chunks


async def serve(
    world_size: int,
    seed: int,
    requests: list[RequestSpec],
    *,
    adapters: Callable[[int, AdapterHandle], ToyAdapter] = adapter_of,
    leaving: frozenset[int] = frozenset(),
    num_host_blocks: int = 0,
    make_drafter: Callable[[], Drafter] | None = None,
    fails: Callable[[int], bool] = lambda number: False,
) -> dict[int, list[TokenChunk]]:
    """Run requests at once and return their chunks."""
    world = World(world_size, seed, adapters, num_host_blocks, make_drafter)
    await world.warm_up()
    for rank in world.ranks:
        rank.engine.model.fails = fails
    assert (await world.group.info()).num_host_blocks == num_host_blocks
    running = asyncio.create_task(world.loop.run())
    jobs = [world.answer(spec, leave_after=2 * (spec.request_id in leaving)) for spec in requests]
    try:
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*jobs)
            await world.group.health()
            # Or a step may have been sent to some ranks only.
            await until(lambda: world.scheduler.is_idle and not world.loop._sent)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    world.scheduler.check()
    stats = world.scheduler.stats()
    PREEMPTIONS.append(stats.num_preemptions)
    assert stats.host.num_held == 0
    assert (stats.host.num_swaps > 0) == (num_host_blocks > 0)
    await world.group.close()
    assert not any(rank.broken for rank in world.ranks)
    return {spec.request_id: chunks for spec, chunks in zip(requests, answers, strict=True)}


def bits(chunks: list[TokenChunk]) -> list[object]:
    """Return what a client is shown."""
    return [
        (
            chunk.tokens.ids, chunk.tokens.logprobs, chunk.tokens.texts, chunk.tokens.special,
            chunk.finish, chunk.generated_text, chunk.alternatives, repr(chunk.prompt_tokens),
            chunk.prompt_alternatives,
        )
        for chunk in chunks
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_ranks_answer_bit_for_bit_as_one(seed: int, world_size: int) -> None:
    @in_loop
    async def scene() -> None:
        requests = specs(seed)
        leaving = frozenset({3, 8, 14})
        alone = await serve(1, seed, requests)
        together = await serve(world_size, seed, requests, leaving=leaving)
        finishes = set()
        for spec in requests:
            if spec.request_id not in leaving:
                assert bits(together[spec.request_id]) == bits(alone[spec.request_id])
                finishes.add(alone[spec.request_id][-1].finish)
        assert finishes == {FinishCode.LENGTH, FinishCode.STOP_SEQUENCE}
        # Which of them gave way to others is a matter of time.
        assert sum(PREEMPTIONS[-2:]) > 0

    scene()


def whole(chunks: list[TokenChunk]) -> list[object]:
    """Return what a client is shown in all, however many tokens came at once."""
    columns = [
        (chunk.tokens.ids, chunk.tokens.logprobs, chunk.tokens.texts, chunk.tokens.special,
         chunk.alternatives)
        for chunk in chunks
    ]  # fmt: skip
    last = chunks[-1]
    return [
        *([value for part in column for value in part] for column in zip(*columns, strict=True)),
        last.finish, last.generated_text, repr(chunks[0].prompt_tokens),
        chunks[0].prompt_alternatives,
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_draft_the_same_and_answer_as_one_that_drafts_nothing(world_size: int) -> None:
    @in_loop
    async def scene() -> None:
        requests = specs(3)
        leaving = frozenset({3, 8, 14})
        alone = await serve(1, 3, requests)
        known = [
            [*spec.prompt_ids, *whole(alone[spec.request_id])[0]]  # type: ignore[misc]
            for spec in requests
        ]
        oracles = []

        def make_drafter() -> Drafter:
            oracles.append(Oracle(known))
            oracle = oracles[-1]
            settings = DraftSettings(max_tokens=3, max_rows=6, max_depth=3)
            return Drafter(settings, lambda: oracle, FREE)

        together = await serve(world_size, 3, requests, leaving=leaving, make_drafter=make_drafter)
        for spec in requests:
            if spec.request_id not in leaving:
                assert whole(together[spec.request_id]) == whole(alone[spec.request_id])
        assert {oracle.num_proposed for oracle in oracles} == {oracles[0].num_proposed}
        assert oracles[0].num_proposed > 20
        assert any(len(chunk.tokens.ids) > 1 for each in together.values() for chunk in each)

    scene()


@in_loop
async def test_ranks_swap_their_parts_and_answer_as_one_that_does_not() -> None:
    """As many host blocks as the rank with the least has; three of the requests leave."""
    requests = specs(4)
    leaving = frozenset({3, 8, 14})
    alone = await serve(1, 4, requests)
    together = await serve(3, 4, requests, leaving=leaving, num_host_blocks=20)
    for spec in requests:
        if spec.request_id not in leaving:
            assert bits(together[spec.request_id]) == bits(alone[spec.request_id])


@in_loop
async def test_a_row_without_finite_logits_fails_alone_on_all_ranks() -> None:
    requests = specs(5)
    bad = new_row(100, [4, NAN_ID], max_new_tokens=9).spec
    alone = await serve(1, 5, requests)
    together = await serve(3, 5, [*requests[:9], bad, *requests[9:]])
    (failed,) = together.pop(100)
    assert failed.finish is FinishCode.ERROR
    assert "no finite" in str(failed.error)
    assert {n: bits(each) for n, each in together.items()} == {
        n: bits(each) for n, each in alone.items()
    }


@in_loop
async def test_an_adapter_that_one_rank_cannot_hold_takes_effect_on_none() -> None:
    def lacking(rank: int, handle: AdapterHandle) -> ToyAdapter:
        return adapter_of(rank, handle) if (rank, handle) != (1, 2) else ToyAdapter(favourite=-1)

    requests = specs(6)
    alone = await serve(1, 6, requests)
    together = await serve(3, 6, requests, adapters=lacking)
    for spec in requests:
        chunks = together[spec.request_id]
        if spec.adapter == 2:
            assert chunks[-1].finish is FinishCode.ERROR
            assert "it could not take effect on rank 1" in str(chunks[-1].error)
        else:
            assert bits(chunks) == bits(alone[spec.request_id])


@pytest.mark.parametrize("drafts", [False, True], ids=["", "drafts"])
@pytest.mark.parametrize("world_size", [1, 3])
@in_loop
async def test_passes_that_fail_on_all_ranks_cost_nobody_a_token(
    world_size: int, drafts: bool
) -> None:
    """Each fifth one, whoever is in it, and those with a row that ends alone."""
    requests = specs(8)
    alone = await serve(1, 8, requests)
    known = [[*spec.prompt_ids, *whole(alone[spec.request_id])[0]] for spec in requests]  # type: ignore[misc]

    def make_drafter() -> Drafter:
        settings = DraftSettings(max_tokens=3, max_rows=6, max_depth=3)
        oracle = Oracle(known)
        return Drafter(settings, lambda: oracle, FREE)

    bad = [new_row(100 + n, [4 + n, POISON_ID], max_new_tokens=9).spec for n in range(2)]
    together = await serve(
        world_size, 8, [*requests[:7], bad[0], *requests[7:], bad[1]],
        fails=lambda number: number % 5 == 0, make_drafter=make_drafter if drafts else None,
    )  # fmt: skip
    for spec in bad:
        (failed,) = together[spec.request_id]
        assert failed.finish is FinishCode.ERROR
        assert "the forward pass failed for this request" in str(failed.error)
    for spec in requests:
        assert whole(together[spec.request_id]) == whole(alone[spec.request_id])


@pytest.mark.parametrize("rank", [0, 2])
@in_loop
async def test_a_pass_that_fails_on_one_rank_ends_the_group_in_words(rank: int) -> None:
    world = World(3, 7, adapter_of)
    await world.warm_up()
    world.ranks[rank].engine.model.fails = lambda number: True
    world.meeting.fail_s = 0.5
    running = asyncio.create_task(world.loop.run())
    rows = [new_row(number, [4, 5], max_new_tokens=9).spec for number in (1, 2)]
    answers = await asyncio.gather(*(world.answer(spec) for spec in rows))
    assert {chunks[-1].finish for chunks in answers} == {FinishCode.ERROR}
    with pytest.raises(Exception, match=r"could not finish a step|waited for the others|has ended"):
        await running
    with pytest.raises(UnhealthyError):
        world.loop.submit(new_row(3, [4], max_new_tokens=1).spec)
    await world.group.close()
    assert f"rank {rank} could not finish a step" in str(world.ranks[rank].broken[0])
    # The others do not wait for ever.
    assert all(each.broken for each in world.ranks)
