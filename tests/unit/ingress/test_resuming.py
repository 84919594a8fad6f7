"""Streams over replicas: whichever of them die, the answer is the one that a single server gives."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from tests.helpers.adapter_world import fetched
from tests.helpers.in_loop import in_loop
from tests.helpers.replicas import ADAPTERS, Replicas, replicas

from lorax_contract.errors import (
    DeadlineError,
    GenerationError,
    ReplicaLostError,
    UnhealthyError,
    ValidationError,
)
from lorax_contract.step import FinishCode
from lorax_ingress.fleet import Chosen
from lorax_ingress.service import MOST_LOST, Journey
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt

NUM = 40


def request(adapter: str | None = None, number: int = 0, **params: Any) -> GenerateRequest:
    values = {"max_new_tokens": NUM, "ignore_eos_token": True, "adapter_id": adapter, **params}
    return GenerateRequest(
        prompt=TextPrompt(f"w{number} w2"), parameters=GenerateParameters(**values)
    )


def sampled(**params: Any) -> dict[str, Any]:
    return {"do_sample": True, "temperature": 0.9, **params}


class Read:
    """What was read of a stream, by sequence."""

    def __init__(self, num: int = 1) -> None:
        self.ids: list[list[int]] = [[] for _ in range(num)]
        self.logprobs: list[list[float]] = [[] for _ in range(num)]
        self.texts = [""] * num
        self.ends: list[Any] = [None] * num

    def take(self, sequence: int, chunk: Any) -> None:
        self.ids[sequence] += chunk.tokens.ids
        self.logprobs[sequence] += chunk.tokens.logprobs
        self.texts[sequence] += "".join(chunk.tokens.texts)
        if chunk.finish is not FinishCode.RUNNING:
            assert self.ends[sequence] is None
            self.ends[sequence] = (chunk.finish, chunk.generated_text)

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    def __hash__(self) -> int:
        return id(self)


async def read(made: Replicas, asked: GenerateRequest, *, hands_over: bool = False) -> Read:
    found = Read(asked.parameters.n or 1)
    async with await made.service.generate_stream(asked) as stream:
        if hands_over:
            stream.hand_to(found.take)
        async for sequence, chunk in stream:
            found.take(sequence, chunk)
        assert stream.num_generated == sum(map(len, found.ids))
        assert stream.is_done
    return found


def crowd() -> list[GenerateRequest]:
    ways: list[dict[str, Any]] = [
        {}, sampled(seed=5), sampled(seed=6, n=3), {"n": 2}, {"stop": [" t7"]}, {"max_new_tokens": 1},
    ]  # fmt: skip
    return [request([None, *ADAPTERS][n % 3], n, **ways[n % len(ways)]) for n in range(24)]


@pytest.mark.parametrize("seed", range(4))
@in_loop
async def test_whoever_dies_nothing_is_missing_and_nothing_there_twice(seed: int) -> None:
    asked, draw = crowd(), random.Random(seed)
    async with replicas(1) as made:
        whole = [await read(made, each) for each in asked]
    async with replicas(4, seed=seed) as made:
        reading = [
            asyncio.create_task(read(made, each, hands_over=number % 2 == 0))
            for number, each in enumerate(asked)
        ]
        for name in draw.sample([*made.by_name], 3):
            for _ in range(draw.randint(0, 150)):
                await asyncio.sleep(0)
            await made.kill(name)
        assert await asyncio.gather(*reading) == whole


@in_loop
async def test_a_loss_counts_once_for_each_of_several_sequences() -> None:
    async with replicas(4) as made:
        asked = request(**sampled(seed=7, n=8))
        whole = await read(made, asked)
        stream = await made.service.generate_stream(asked)
        found = Read(8)
        for _ in range(MOST_LOST):
            for _ in range(16):
                found.take(*await anext(stream))
            await made.kill(made.places()[0])
        async for sequence, chunk in stream:
            found.take(sequence, chunk)
        assert found == whole


@in_loop
async def test_an_unseeded_stream_goes_on_with_its_own_seed() -> None:
    async with replicas(2) as made:
        stream = await made.service.generate_stream(request(**sampled()))
        assert stream.seed is not None
        found = Read()
        for _ in range(5):
            found.take(*await anext(stream))
        await made.kill(*made.places())
        async for sequence, chunk in stream:
            found.take(sequence, chunk)
        assert await read(made, request(**sampled(seed=stream.seed))) == found


@in_loop
async def test_a_whole_answer_begins_anew() -> None:
    async with replicas(2) as made:
        expected = (await made.service.generate(request("poet", **sampled(seed=3)))).texts
        asking = asyncio.create_task(made.service.generate(request("poet", **sampled(seed=3))))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not asking.done()
        await made.kill(*made.places())
        assert (await asking).texts == expected


@in_loop
async def test_with_nobody_left_it_waits_and_then_says_so() -> None:
    async with replicas(1, wait_s=0.05) as made:
        stream = await made.service.generate_stream(request())
        await anext(stream)
        await made.kill("r0")
        with pytest.raises(UnhealthyError, match="no replica took the request"):
            async for _ in stream:
                pass
        with pytest.raises(UnhealthyError):
            await made.service.generate(request())


@in_loop
async def test_one_that_comes_back_goes_on_with_it() -> None:
    async with replicas(2) as made:
        asked = request("poet")
        whole = await read(made, asked)
        other = made.by_name["r1"]
        await made.kill("r0")
        made.fleet.lost("r1")
        reading = asyncio.create_task(read(made, asked))
        await asyncio.sleep(0.02)
        assert not reading.done()
        made.attach(other)
        assert await reading == whole


@in_loop
async def test_a_replica_that_drains_is_asked_for_nothing_more() -> None:
    async with replicas(2) as made:
        parts = made.by_name["r0"].world.parts
        num_before = parts.engine.stats().num_steps
        parts.service.stop_admitting()
        for number in range(6):
            assert (await read(made, request(None, number))).ends[0][0] is FinishCode.LENGTH
        assert parts.engine.stats().num_steps == num_before


async def read_and_kill(made: Replicas, stream: Any) -> None:
    async for _ in stream:
        # What it said before is read first.
        for name in made.places():
            await made.kill(name)


@in_loop
async def test_what_kills_one_after_the_other_is_not_sent_to_all() -> None:
    async with replicas(6) as made:
        stream = await made.service.generate_stream(request(max_new_tokens=150))
        with pytest.raises(ReplicaLostError):
            await read_and_kill(made, stream)
        assert len(made.by_name) == 2


@in_loop
async def test_an_adapter_that_was_replaced_meanwhile_does_not_go_on() -> None:
    async with replicas(2) as made:
        stream = await made.service.generate_stream(request("poet"))
        await anext(stream)
        for each in made.by_name.values():
            each.world.sources.contents["poet"] = fetched("another")
        await made.kill(*made.places())
        with pytest.raises(GenerationError, match="was replaced"):
            async for _ in stream:
                pass


@in_loop
async def test_what_is_wrong_with_a_request_is_said_once() -> None:
    async with replicas(2) as made:
        with pytest.raises(ValidationError, match="max_new_tokens"):
            await made.service.generate_stream(request(max_new_tokens=-1))
        assert not made.places()


@in_loop
async def test_the_next_replica_gets_what_is_left_of_a_request_s_time() -> None:
    async with replicas(1) as made:
        moments, told = iter([0.0, 2.0, 6.0]), []

        async def work(chosen: Chosen, rest: GenerateRequest) -> None:
            chosen.ends()
            told.append(rest.parameters.timeout_s)

        journey = Journey(made.fleet, lambda: next(moments))
        await journey.over(request(timeout_s=5.0), work)
        with pytest.raises(DeadlineError):
            await journey.over(request(timeout_s=5.0), work)
        assert told == [3.0]
        assert not made.places()


@in_loop
async def test_closing_cancels_it_wherever_it_is() -> None:
    async with replicas(2) as made:
        stream = await made.service.generate_stream(request(n=2, max_new_tokens=150))
        await anext(stream)
        await made.kill(*made.places())
        await anext(stream)
        await stream.aclose()
        (left,) = made.by_name.values()
        async with asyncio.timeout(5):
            while left.world.parts.engine.stats().num_running:
                await asyncio.sleep(0.01)
        assert not made.places()
