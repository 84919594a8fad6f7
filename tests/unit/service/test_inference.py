"""The inference service over a scripted engine."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from typing import Any

import pytest
from tests.helpers.adapter_world import adapter_world
from tests.helpers.http_app import World, until
from tests.helpers.in_loop import in_loop
from tests.helpers.scripted_engine import ScriptedEngine, failure, words

from lorax_contract.errors import (
    GenerationError,
    IncompleteGenerationError,
    LoraxError,
    OverloadedError,
    ShardError,
    ShuttingDownError,
    UnhealthyError,
    ValidationError,
)
from lorax_contract.step import FinishCode, RequestSpec, TokenColumns
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.requests import (
    ChatPrompt,
    GenerateParameters,
    GenerateRequest,
    TextPrompt,
)


def request(inputs: str = "w1 w2", *, chat: bool = False, **params: Any) -> GenerateRequest:
    prompt = ChatPrompt.of_user(inputs) if chat else TextPrompt(inputs)
    parameters = GenerateParameters(**params)
    return GenerateRequest(prompt=prompt, sent_text=inputs, parameters=parameters)


def scripted(*texts: str, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(lambda spec: words(*texts, **options))


def test_a_result_has_tokens_text_and_the_moments_in_order():
    async def run() -> None:
        world = World()
        result = await world.service.generate(request(max_new_tokens=3))
        (sequence,) = result.sequences
        assert result.texts == (" w0 w1 w2",)
        assert (sequence.num_generated, sequence.finish_reason) == (3, "length")
        assert (result.num_prompt_tokens, result.num_prompt_chars) == (3, 5)
        t = result.timings
        moments = [t.received_at, t.validated_at, t.scheduled_at, t.first_token_at, t.last_token_at]
        assert moments == sorted(moments)
        assert t.validation_s + t.queue_s + t.inference_s == pytest.approx(t.total_s)
        assert world.metric("lorax_request_success_total") == 1
        assert world.metric("lorax_request_inter_token_duration_count") == 2
        assert world.metric("lorax_request_time_to_first_token_duration_count") == 1

    asyncio.run(run())


def test_the_engine_gets_exactly_what_was_validated():
    async def run() -> RequestSpec:
        world = World()
        params = {"temperature": 0.5, "seed": 3, "max_new_tokens": 4, "stop": ["x"]}
        await world.service.generate(request("w4 w5", truncate=1, **params))
        return world.engine.submitted[0]

    spec = asyncio.run(run())
    assert list(spec.prompt_ids) == [5]
    assert (spec.sampling.do_sample, spec.sampling.temperature, spec.sampling.seed) == (
        True,
        0.5,
        3,
    )
    assert (spec.stopping.max_new_tokens, spec.stopping.stop_sequences) == (4, ("x",))


def test_best_of_runs_different_seeds_and_puts_the_likeliest_first():
    logprobs = {0: -3.0, 1: -1.0, 2: -2.0}

    async def run() -> None:
        world = World()
        order: dict[int, int] = {}

        def script(spec: RequestSpec):
            place = order.setdefault(spec.request_id, len(order))
            return words(f"text{place}", logprob=logprobs[place])

        world.engine.script = script
        world.validator.limits = type(world.bounds)(
            max_input_length=20, max_total_tokens=30, vocab_size=906, max_best_of=3
        )
        result = await world.service.generate(request(best_of=3, do_sample=True))
        assert result.texts == ("text1", "text2", "text0")
        assert len({spec.sampling.seed for spec in world.engine.submitted}) == 3
        seeds = [spec.sampling.seed for spec in world.engine.submitted]
        assert [each.seed for each in result.sequences] == [seeds[1], seeds[2], seeds[0]]
        assert world.metric("lorax_request_count_total") == 1
        assert world.metric("lorax_request_success_total") == 1

    asyncio.run(run())


def test_seed_is_reported_only_when_tokens_were_drawn():
    async def run() -> None:
        world = World()
        greedy = await world.service.generate(request(seed=5))
        drawn = await world.service.generate(request(seed=5, do_sample=True))
        assert greedy.sequences[0].seed is None
        assert drawn.sequences[0].seed == 5

    asyncio.run(run())


def test_permits_run_out_and_come_back():
    async def run() -> None:
        world = World(max_concurrent_requests=2)
        world.engine.open.clear()
        running = [asyncio.ensure_future(world.service.generate(request())) for _ in range(2)]
        await until(lambda: len(world.engine.submitted) == 2)
        with pytest.raises(OverloadedError):
            await world.service.generate(request())
        with pytest.raises(OverloadedError):
            await world.service.generate_stream(request())
        assert world.metric("lorax_request_failure_total", err="overloaded") == 2
        world.engine.open.set()
        await asyncio.gather(*running)
        await world.service.generate(request())

    asyncio.run(run())


def test_best_of_takes_a_permit_for_each_sequence():
    async def run() -> None:
        world = World(max_concurrent_requests=1)
        with pytest.raises(OverloadedError):
            await world.service.generate(request(best_of=2, do_sample=True))
        await world.service.generate(request())

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_refused_request_takes_no_permit(is_stream):
    async def run() -> None:
        world = World(max_concurrent_requests=1)
        call = world.service.generate_stream if is_stream else world.service.generate
        for inputs in ("", "w1 " * 50):
            with pytest.raises(ValidationError):
                await call(request(inputs))
        world.engine.refusal = ValidationError("can never fit")
        with pytest.raises(ValidationError, match="can never fit"):
            await call(request())
        world.engine.refusal = None
        await world.service.generate(request())
        assert world.metric("lorax_request_failure_total", err="validation") == 3

    asyncio.run(run())


def test_a_stream_hands_out_chunks_as_they_come():
    async def run() -> None:
        world = World(engine=scripted("a", "b", "c", finish=FinishCode.EOS_TOKEN))
        async with await world.service.generate_stream(request()) as stream:
            chunks = [chunk async for _, chunk in stream]
        assert [chunk.tokens.texts for chunk in chunks] == [["a"], ["b"], ["c"]]
        assert chunks[-1].finish is FinishCode.EOS_TOKEN
        assert stream.num_generated == 3
        assert world.engine.cancelled == []
        assert world.metric("lorax_request_success_total") == 1

    asyncio.run(run())


def test_sequences_of_one_stream_come_as_they_are_made():
    async def run() -> None:
        world = World()
        async with await world.service.generate_stream(request(n=3, max_new_tokens=4)) as stream:
            chunks = [each async for each in stream]
        texts = ["".join(t for n, c in chunks if n == number for t in c.tokens.texts)
                 for number in range(3)]  # fmt: skip
        assert texts == [" w0 w1 w2 w3"] * 3
        assert stream.num_generated == 12
        assert world.metric("lorax_request_success_total") == 1
        assert world.engine.cancelled == []

    asyncio.run(run())


def test_a_sequence_that_fails_ends_the_others():
    async def run() -> None:
        world = World(max_concurrent_requests=2)

        def script(spec: RequestSpec):
            if spec.request_id % 2:
                return iter(
                    [TokenChunk(TokenColumns(), FinishCode.ERROR, error=ShardError("lost"))]
                )
            return words(*"abc")

        world.engine.script = script
        with pytest.raises(GenerationError):
            await read_stream(world, request(n=2))
        with pytest.raises(GenerationError):
            await world.service.generate(request(n=2))
        assert world.metric("lorax_request_failure_total", err="generation") == 2
        world.engine.script = lambda spec: words(*"abc")
        await world.service.generate(request(n=2))  # its permits are back

    asyncio.run(run())


def test_who_asks_for_n_gets_them_in_order_or_the_likeliest_of_more():
    logprobs = {0: -3.0, 1: -1.0, 2: -2.0}

    async def run() -> None:
        world = World()
        world.validator.limits = dataclasses.replace(world.bounds, max_best_of=3)
        order: dict[int, int] = {}

        def script(spec: RequestSpec):
            place = order.setdefault(spec.request_id, len(order) % 3)
            return words(f"text{place}", logprob=logprobs[place])

        world.engine.script = script
        in_order = await world.service.generate(request(n=3, do_sample=True, seed=7))
        assert in_order.texts == ("text0", "text1", "text2")
        assert [each.seed for each in in_order.sequences] == [7, 8, 9]
        likeliest = await world.service.generate(request(n=2, best_of=3, do_sample=True))
        assert likeliest.texts == ("text1", "text2")
        with pytest.raises(ValidationError, match="best_of` must be at least `n`, which is 3"):
            await world.service.generate(request(n=3, best_of=2, do_sample=True))

    asyncio.run(run())


async def read_stream(world: World, wanted: GenerateRequest) -> None:
    async with await world.service.generate_stream(wanted) as stream:
        async for _ in stream:
            pass


@pytest.mark.parametrize("num_read", [0, 1])
def test_closing_a_stream_early_cancels_the_request(num_read):
    async def run() -> None:
        world = World(engine=scripted("a", "b", "c"), max_concurrent_requests=1)
        stream = await world.service.generate_stream(request())
        for _ in range(num_read):
            await anext(stream)
        await stream.aclose()
        await stream.aclose()
        assert len(world.engine.cancelled) == 1
        assert world.metric("lorax_request_failure_total", err="dropped") == 1
        await world.service.generate(request())  # its permit is back, once
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(run())


def test_cancelling_a_waiting_call_cancels_all_its_sequences():
    async def run() -> None:
        world = World()
        world.engine.open.clear()
        task = asyncio.ensure_future(world.service.generate(request(best_of=2, do_sample=True)))
        await until(lambda: len(world.engine.submitted) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(world.engine.cancelled) == [1, 2]
        assert world.metric("lorax_request_failure_total", err="dropped") == 1

    asyncio.run(run())


def test_when_one_sequence_fails_the_others_end():
    async def run() -> None:
        world = World()

        def script(spec: RequestSpec):
            if spec.request_id % 2:
                return failure(GenerationError("row 1"))
            return words(*("x" for _ in range(500)))

        world.engine.script = script
        world.engine.delay_s = 0.001
        with pytest.raises(GenerationError, match="row 1"):
            await world.service.generate(request(best_of=2, do_sample=True))
        assert world.engine.cancelled == [2]

    asyncio.run(run())


async def read_all(world: World) -> None:
    async with await world.service.generate_stream(request()) as stream:
        async for _ in stream:
            pass


def endless(spec: RequestSpec):
    yield TokenChunk(TokenColumns([1], [-1.0], ["a"], [False]))


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("script", "error", "shown", "label"),
    [
        (
            lambda spec: failure(GenerationError("out of memory")),
            GenerationError,
            "Request failed during generation: out of memory",
            "generation",
        ),
        (
            lambda spec: failure(ShardError("unix:/secret/path is gone")),
            GenerationError,
            "Request failed during generation: a shard failed",
            "generation",
        ),
        (endless, IncompleteGenerationError, "Incomplete generation", "incomplete"),
        (
            lambda spec: iter([TokenChunk(TokenColumns(), FinishCode.LENGTH, generated_text="")]),
            IncompleteGenerationError,
            "Incomplete generation",
            "incomplete",
        ),
    ],
)
def test_failures_reach_the_client_in_words(is_stream, script, error, shown, label):
    async def run() -> None:
        world = World(engine=ScriptedEngine(script), max_concurrent_requests=1)
        for _ in range(2):  # the permit comes back
            with pytest.raises(error) as caught:
                await (read_all(world) if is_stream else world.service.generate(request()))
            assert caught.value.public == shown
        assert world.metric("lorax_request_failure_total", err=label) == 2

    asyncio.run(run())


def test_draining_refuses_new_requests_and_finishes_old_ones():
    async def run() -> None:
        world = World()
        world.engine.open.clear()
        task = asyncio.ensure_future(world.service.generate(request()))
        await until(lambda: world.engine.submitted)
        world.service.stop_admitting()
        for call in (world.service.generate(request()), world.service.health()):
            with pytest.raises(ShuttingDownError):
                await call
        waiter = asyncio.ensure_future(world.service.wait_idle())
        await asyncio.sleep(0)
        assert not waiter.done()
        world.engine.open.set()
        await task
        await waiter

    asyncio.run(run())


@in_loop
async def test_who_still_waits_for_an_adapter_at_the_end_is_told():
    async with adapter_world() as world:
        # A source that never answers.
        world.sources.contents["a"] = asyncio.get_running_loop().create_future()
        service, asked = world.parts.service, world.request("a")
        calls = [service.generate(asked), service.generate_stream(asked)]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await until(lambda: len(world.shard.queries) == 2)
        service.end_resolving()
        for task in tasks:
            with pytest.raises(ShuttingDownError):
                await task
        assert (await world.metrics())["lorax_requests_resolving"] == 0
        await service.wait_idle()


def test_health_notices_that_no_text_can_be_tokenized():
    async def run() -> None:
        world = World(health_timeout_s=0.05)
        gate = threading.Event()
        # As many as there are threads; whoever wanted it has left.
        stuck = [asyncio.ensure_future(world.tokenizer.run(gate.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        for task in stuck:
            task.cancel()
        for _ in range(2):
            with pytest.raises(UnhealthyError, match="no text can be tokenized"):
                await world.service.health()
        assert (await world.client().get("/health")).status_code == 503
        gate.set()
        while (await world.client().get("/health")).status_code != 200:
            await asyncio.sleep(0)

    asyncio.run(run())


def test_threads_that_are_busy_are_healthy():
    async def run() -> None:
        world = World()
        turns = threading.Semaphore(0)
        busy = [asyncio.ensure_future(world.tokenizer.run(turns.acquire)) for _ in range(200)]
        await asyncio.sleep(0)
        try:
            for num_done in range(1, 6):
                health = asyncio.ensure_future(world.service.health())
                await asyncio.sleep(0)
                turns.release()
                # A thread has done one text; what health asks for itself is behind all others.
                await health
                assert sum(task.done() for task in busy) <= num_done
        finally:
            turns.release(len(busy))
        await asyncio.gather(*busy)

    asyncio.run(run())


def test_health_is_the_engine_s_and_never_hangs():
    async def run() -> None:
        await World().service.health()
        world = World(health_timeout_s=0.05)
        world.engine.unhealthy = UnhealthyError("rank 1 is gone", public="")
        with pytest.raises(UnhealthyError) as caught:
            await world.service.health()
        assert caught.value.public == "unhealthy"
        world.engine.hangs = True
        with pytest.raises(UnhealthyError, match="do not answer"):
            await world.service.health()

    asyncio.run(run())


def test_the_probe_needs_no_permit_and_leaves_no_trace():
    async def run() -> None:
        world = World(max_concurrent_requests=1)
        world.engine.open.clear()
        task = asyncio.ensure_future(world.service.generate(request()))
        await until(lambda: world.engine.submitted)
        probe = asyncio.ensure_future(world.service.probe())
        await until(lambda: len(world.engine.submitted) == 2)
        assert world.engine.submitted[1].stopping.max_new_tokens == 1
        world.engine.open.set()
        await probe
        await task
        assert world.metric("lorax_request_count_total") == 1
        world.engine.script = lambda spec: failure(GenerationError("broken"))
        with pytest.raises(GenerationError):
            await world.service.probe()

    asyncio.run(run())


def test_each_request_writes_one_line_and_w30_no_secret_in_it(caplog):
    """LoRAX logs parameters with the token in them."""
    caplog.set_level(logging.DEBUG)

    async def run() -> None:
        world = World()
        params = {"api_token": "hf_secret", "max_new_tokens": 2}
        await world.service.generate(request("w7 private", **params))
        async with await world.service.generate_stream(request("w7 private", **params)) as stream:
            async for _ in stream:
                pass
        with pytest.raises(LoraxError):
            await world.service.generate(request("w7 private", best_of=99, **params))

    asyncio.run(run())
    lines = [record for record in caplog.records if record.name == "lorax_router.request"]
    assert [line.fields["outcome"] for line in lines] == ["ok", "ok", "validation"]
    assert [line.fields["stream"] for line in lines] == [False, True, False]
    first = lines[0].fields
    assert (first["prompt_tokens"], first["generated_tokens"]) == (3, 2)
    assert first["finish_reason"] == "length"
    whole = "".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)
    assert "hf_secret" not in whole
    assert "private" not in whole
