"""The engine loop by itself: what becomes of steps, streams and tasks when something ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest
from tests.helpers.adapter_world import DirectExecutor

from lorax_contract.errors import (
    DeadlineError,
    GenerationError,
    LoraxError,
    QueueFullError,
    ShardUnavailableError,
    UnhealthyError,
)
from lorax_contract.step import (
    AdapterHandle,
    FinishCode,
    OutputKind,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.request import RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.tenant_limits import TenantLimits
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.shards.fake.shard import FakeModel, FakeShard


class FailingShard:
    """Collects steps and fails all of them at one moment."""

    def __init__(self) -> None:
        self.steps: list[StepPlan] = []
        self.gone = asyncio.Event()

    async def step(self, plan: StepPlan) -> StepOutcome:
        self.steps.append(plan)
        await self.gone.wait()
        raise ShardUnavailableError("gone")

    async def health(self) -> None:
        raise GenerationError("the engine thread has ended")


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_loop(shard: Any, depth: int = 2, **values: Any) -> EngineLoop:
    scheduler = Scheduler(num_blocks=100, block_size=4, max_step_tokens=64, max_rows=8, depth=depth)
    return EngineLoop(shard, scheduler, **values)


def make_adapter_loop(shard: FakeShard) -> EngineLoop:
    scheduler = Scheduler(
        num_blocks=100, block_size=4, max_step_tokens=64, max_rows=8, depth=2,
        adapters=AdapterTable(max_resident=2),
    )  # fmt: skip
    return EngineLoop(shard, scheduler, adapters=DirectExecutor(shard))


def spec_of(loop: EngineLoop, num: int = 20, adapter: int = 0) -> RequestSpec:
    return RequestSpec(
        request_id=loop.new_request_id(),
        prompt_ids=[1, 2, 3],
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=num, ignore_eos=True),
        adapter=AdapterHandle(adapter),
    )


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_when_all_steps_in_flight_fail_every_stream_ends_and_the_loop_refuses_more():
    async def scene() -> None:
        shard = FailingShard()
        loop = make_loop(shard)
        running = asyncio.create_task(loop.run())
        streams = [loop.submit(spec_of(loop)) for _ in range(3)]
        await until(lambda: len(shard.steps) == 2)
        shard.gone.set()
        for stream in streams:
            (chunk,) = [chunk async for chunk in stream]
            assert chunk.finish is FinishCode.ERROR
        with pytest.raises(ShardUnavailableError):
            await running
        with pytest.raises(UnhealthyError):
            loop.submit(spec_of(loop))

    play(scene())


def test_a_crowd_that_asks_for_health_is_one_call_of_the_shards():
    class CountingShard(FailingShard):
        num_calls = 0
        answers = asyncio.Event()

        async def health(self) -> None:
            self.num_calls += 1
            await self.answers.wait()

    async def scene() -> None:
        shard = CountingShard()
        loop = make_loop(shard)
        crowd = [asyncio.ensure_future(loop.health()) for _ in range(50)]
        await asyncio.sleep(0.01)
        # Who leaves takes nobody along.
        crowd.pop(0).cancel()
        shard.answers.set()
        await asyncio.gather(*crowd)
        assert shard.num_calls == 1
        await loop.health()
        assert shard.num_calls == 2

    play(scene())


def test_whatever_a_health_call_raises_is_unhealthy():
    async def scene() -> None:
        with pytest.raises(UnhealthyError):
            await make_loop(FailingShard()).health()

    play(scene())


@pytest.mark.parametrize("depth", [1, 2])
def test_a_stream_that_nobody_reads_ends_and_holds_no_blocks(depth):
    """Its tokens wait for their reader; their number is bounded by the request's own limit."""

    async def scene() -> None:
        loop = make_loop(FakeShard(FakeModel(vocab_size=50), num_blocks=100, block_size=4), depth)
        running = asyncio.create_task(loop.run())
        unread = loop.submit(spec_of(loop, num=30))
        read = loop.submit(spec_of(loop, num=60))
        assert sum([len(chunk.tokens.ids) async for chunk in read]) == 60
        await until(lambda: loop.stats().num_running == 0)
        assert loop.stats().num_free_blocks == 100
        assert sum([len(chunk.tokens.ids) async for chunk in unread]) == 30
        running.cancel()

    play(scene())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_read", [0, 1, 5])
def test_a_stream_closed_at_any_moment_leaves_nothing_behind(depth, num_read):
    async def scene() -> None:
        shard = FakeShard(FakeModel(vocab_size=50), num_blocks=100, block_size=4)
        loop = make_loop(shard, depth)
        running = asyncio.create_task(loop.run())
        for turns in range(8):
            stream = loop.submit(spec_of(loop, num=300))
            for _ in range(num_read):
                await anext(stream)
            for _ in range(turns):
                await asyncio.sleep(0)
            await stream.aclose()
            steps = len(shard.steps)
            await until(lambda: loop.stats().num_free_blocks == 100)
            assert loop.stats().num_running == loop.stats().num_waiting == 0
            # What was in flight, and one step that tells the shard.
            assert len(shard.steps) <= steps + depth + 1
        # The loop sleeps now; a request wakes it.
        stream = loop.submit(spec_of(loop, num=3))
        assert sum([len(chunk.tokens.ids) async for chunk in stream]) == 3
        running.cancel()

    play(scene())


def test_a_reader_that_is_cancelled_while_it_waits_can_still_close_its_stream():
    async def scene() -> None:
        shard = FakeShard(FakeModel(vocab_size=50), num_blocks=100, block_size=4)
        loop = make_loop(shard)
        shard.hold()
        running = asyncio.create_task(loop.run())
        stream = loop.submit(spec_of(loop))
        reader = asyncio.create_task(anext(stream))
        await shard.arrived(1)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await stream.aclose()
        shard.let_go()
        await until(lambda: loop.stats().num_free_blocks == 100)
        running.cancel()

    play(scene())


def test_an_adapter_that_does_not_take_effect_fails_its_requests_until_it_does():
    async def scene() -> None:
        shard = FakeShard(FakeModel(vocab_size=50), num_blocks=100, block_size=4)
        loop = make_adapter_loop(shard)
        loop.add_adapter(AdapterHandle(1), 1)
        running = asyncio.create_task(loop.run())
        shard.fail_activation(AdapterHandle(1), "no room for adapter 1")
        for _ in range(2):
            (chunk,) = [chunk async for chunk in loop.submit(spec_of(loop, adapter=1))]
            assert "no room for adapter 1" in str(chunk.error)
        assert sum([len(chunk.tokens.ids) async for chunk in loop.submit(spec_of(loop))]) == 20
        shard.fail_activation(AdapterHandle(1), None)
        stream = loop.submit(spec_of(loop, adapter=1))
        assert sum([len(chunk.tokens.ids) async for chunk in stream]) == 20
        running.cancel()

    play(scene())


def test_cancelling_the_loop_ends_every_stream_in_words_and_refuses_new_ones():
    async def scene() -> None:
        loop = make_loop(FakeShard(FakeModel(vocab_size=50), num_blocks=100, block_size=4))
        running = asyncio.create_task(loop.run())
        streams = [loop.submit(spec_of(loop, num=300)) for _ in range(12)]
        await anext(streams[0])
        running.cancel()
        for stream in streams:
            chunks = [chunk async for chunk in stream]
            assert isinstance(chunks[-1].error, LoraxError)
        with pytest.raises(LoraxError, match="shutting down"):
            loop.submit(spec_of(loop))

    play(scene())


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_without_tokens_has_one_chunk_with_its_prompt(depth):
    async def scene() -> None:
        loop = make_loop(FakeShard(FakeModel(vocab_size=50), num_blocks=100, block_size=4), depth)
        running = asyncio.create_task(loop.run())
        spec = replace(
            spec_of(loop, num=0),
            output=OutputKind.PROMPT,
            sampling=SamplingParams(prompt_logprobs=True, num_prompt_alternatives=2),
        )
        other = loop.submit(spec_of(loop, num=9))
        (chunk,) = [chunk async for chunk in loop.submit(spec)]
        assert chunk.finish is FinishCode.LENGTH
        assert (chunk.tokens.ids, chunk.generated_text) == ([], "")
        assert chunk.prompt_tokens is not None
        assert chunk.prompt_tokens.ids == [1, 2, 3]
        assert [len(each.ids) for each in chunk.prompt_alternatives] == [0, 2, 2]
        assert sum([len(chunk.tokens.ids) async for chunk in other]) == 9
        await until(lambda: loop.stats().num_running == 0)
        assert loop.stats().num_free_blocks == 100
        running.cancel()

    play(scene())


def test_a_running_request_whose_time_is_over_ends_with_an_error_and_others_go_on():
    async def scene() -> None:
        clock = Clock()
        loop = make_loop(FakeShard(num_blocks=100), clock=clock)
        running = asyncio.create_task(loop.run())
        late = loop.submit(spec_of(loop, num=200), RequestTerms(deadline=5.0))
        other = loop.submit(spec_of(loop, num=20))
        await anext(late)
        clock.now = 6.0
        chunks = [chunk async for chunk in late]
        assert isinstance(chunks[-1].error, DeadlineError)
        assert len([chunk async for chunk in other]) == 20
        await late.aclose()
        running.cancel()

    play(scene())


def test_a_request_that_waits_for_its_adapter_alone_ends_at_its_deadline():
    async def scene() -> None:
        shard = FakeShard(num_blocks=100, adapter_delay_s=1000.0)
        loop = make_adapter_loop(shard)
        loop.add_adapter(AdapterHandle(1), 10)
        running = asyncio.create_task(loop.run())
        terms = RequestTerms(deadline=perf_counter() + 0.05)
        (chunk,) = [each async for each in loop.submit(spec_of(loop, adapter=1), terms)]
        assert isinstance(chunk.error, DeadlineError)
        running.cancel()

    play(scene())


def test_sequences_that_the_queue_has_no_place_for_are_refused_before_they_are_queued():
    async def scene() -> None:
        loop = make_loop(FakeShard(num_blocks=100))
        one = RequestTerms("a", limits=TenantLimits(queued_requests=2))
        loop.check_place(one, num_requests=2)
        loop.submit(spec_of(loop), one)
        with pytest.raises(QueueFullError):
            loop.check_place(one, num_requests=2)

    play(scene())


def test_chunks_are_handed_over_as_they_come_and_the_last_one_is_read():
    async def scene() -> None:
        loop = make_loop(FakeShard(num_blocks=100))
        handed: list[int] = []
        stream = loop.submit(spec_of(loop, num=9))
        running = asyncio.create_task(loop.run())
        first = await anext(stream)
        stream.hand_to(lambda chunk: handed.extend(chunk.tokens.ids))
        read = [chunk async for chunk in stream]
        # What came before it was handed over, and the end, are the reader's.
        assert read[-1].finish is FinishCode.LENGTH
        tokens = [*first.tokens.ids, *handed, *read[-1].tokens.ids]
        assert len(tokens) == 9
        assert len(handed) >= 6
        running.cancel()

    play(scene())


def test_chunks_that_wait_to_be_read_are_read_before_any_is_handed_over():
    async def scene() -> None:
        loop = make_loop(FakeShard(num_blocks=100))
        order: list[str] = []
        stream = loop.submit(spec_of(loop, num=12))
        other = loop.submit(spec_of(loop, num=4))
        running = asyncio.create_task(loop.run())
        async for _ in other:
            pass
        stream.hand_to(lambda chunk: order.extend(["handed"] * len(chunk.tokens.ids)))
        async for chunk in stream:
            order.extend(["read"] * len(chunk.tokens.ids))
        assert len(order) == 12
        assert order[:3] == ["read"] * 3
        assert "read" not in order[order.index("handed") : -1]
        running.cancel()

    play(scene())


def test_what_takes_a_chunk_and_fails_fails_its_own_reader_and_nobody_else():
    async def scene() -> None:
        loop = make_loop(FakeShard(num_blocks=100))
        running = asyncio.create_task(loop.run())
        faulty, sound = loop.submit(spec_of(loop)), loop.submit(spec_of(loop))

        def fail(_: object) -> None:
            raise KeyError("a fault")

        await anext(faulty)
        faulty.hand_to(fail)
        with pytest.raises(KeyError, match="a fault"):
            await anext(faulty)
        await faulty.aclose()
        assert sum([len(chunk.tokens.ids) async for chunk in sound]) == 20
        await until(lambda: not loop.stats().num_running)
        assert not running.done()
        running.cancel()

    play(scene())


def test_a_stream_that_is_closed_hands_nothing_over_any_more():
    async def scene() -> None:
        loop = make_loop(FakeShard(num_blocks=100))
        running = asyncio.create_task(loop.run())
        stream = loop.submit(spec_of(loop, num=50))
        handed: list[object] = []
        await anext(stream)
        stream.hand_to(handed.append)
        await until(lambda: handed)
        await stream.aclose()
        num = len(handed)
        await until(lambda: not loop.stats().num_running)
        assert len(handed) == num
        running.cancel()

    play(scene())


class WatchedShard(FakeShard):
    """Notes when steps begin."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(FakeModel(vocab_size=20), num_blocks=100, block_size=4)
        self._notes = notes

    async def step(self, plan: StepPlan) -> StepOutcome:
        # As over gRPC, where a call begins in a task of its own.
        await asyncio.sleep(0)
        self._notes.append("step")
        return await super().step(plan)


def test_the_next_step_is_sent_before_tokens_are_booked_and_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one step in flight, once rows only decode."""
    notes: list[str] = []
    apply = Scheduler.apply

    def noted(scheduler: Scheduler, outcome: StepOutcome, now: float) -> list[bool]:
        notes.append("applied")
        return apply(scheduler, outcome, now)

    monkeypatch.setattr(Scheduler, "apply", noted)

    async def scene() -> None:
        loop = make_loop(WatchedShard(notes), depth=1)
        running = asyncio.create_task(loop.run())
        stream = loop.submit(spec_of(loop, 8))
        stream.hand_to(lambda chunk: notes.append("token"))
        num = len([chunk async for chunk in stream])
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert num == 1

    play(scene())
    assert notes[:4] == ["step", "applied", "step", "token"]
    assert notes[4:10] == ["step", "applied", "token"] * 2
