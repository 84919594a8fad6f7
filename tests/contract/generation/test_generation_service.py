"""What every GenerationService does, in its own process and through a link to another one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import pytest
from tests.helpers.fronts import closing, front_of
from tests.helpers.http_app import World, until
from tests.helpers.in_loop import in_loop
from tests.helpers.scripted_engine import ScriptedEngine, failure, words

from lorax_contract.errors import (
    GenerationError,
    LoraxError,
    OverloadedError,
    QueueFullError,
    ShuttingDownError,
    ValidationError,
)
from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_contract.step import FinishCode, RequestSpec
from lorax_router.service.abilities import Abilities
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.generation import GenerationService, RequestCounts
from lorax_router.service.requests import (
    BASE_MODEL_ADAPTER_ID,
    ChatPrompt,
    GenerateParameters,
    GenerateRequest,
    TextPrompt,
    TokenPrompt,
)


@dataclass
class Asked:
    """A service and the world that it is the service of."""

    world: World
    service: GenerationService
    counts: RequestCounts


def of_core(world: World) -> Any:
    return contextlib.nullcontext(Asked(world, world.service, world.service.ledger))


@contextlib.asynccontextmanager
async def of_front(world: World) -> Any:
    async with closing(front_of(world)) as pair:
        yield Asked(world, pair.service, pair.counts)


@pytest.fixture(params=[of_core, of_front], ids=["core", "front"])
def asked(request: pytest.FixtureRequest) -> Callable[[World], Any]:
    return request.param


def request_of(prompt: Any = None, **params: Any) -> GenerateRequest:
    parameters = GenerateParameters(**{"max_new_tokens": 3, **params})
    prompt = TextPrompt("w1 w2") if prompt is None else prompt
    return GenerateRequest(prompt=prompt, sent_text="w1 w2", parameters=parameters)


async def read(
    service: GenerationService,
    request: GenerateRequest,
    chunks: list[TokenChunk] | None = None,
    sink: Callable[[int, TokenChunk], None] | None = None,
) -> None:
    """Read a stream to its end; a sink is offered after each chunk."""
    async with await service.generate_stream(request) as stream:
        async for _, chunk in stream:
            if chunks is not None:
                chunks.append(chunk)
            if sink is not None:
                stream.hand_to(sink)


def saying(*texts: str, **options: Any) -> World:
    return World(engine=ScriptedEngine(lambda spec: words(*texts, **options)))


@in_loop
async def test_an_answer_is_whole(asked):
    async with asked(World()) as here:
        result = await here.service.generate(request_of(details=True, return_full_text=True))
        assert result.texts == ("w1 w2 w0 w1 w2",)
        (sequence,) = result.sequences
        assert sequence.tokens.texts == [" w0", " w1", " w2"]
        assert (sequence.finish, result.details) == (FinishCode.LENGTH, True)
        assert (result.num_prompt_tokens, result.num_prompt_chars) == (3, 5)
        t = result.timings
        moments = [t.received_at, t.validated_at, t.scheduled_at, t.first_token_at, t.last_token_at]
        assert moments == sorted(moments)
        assert t.received_at > 0


@pytest.mark.parametrize(
    "prompt", [TextPrompt("w1", add_special_tokens=False), TokenPrompt([5, 6]), ChatPrompt.of_user("w1")]
)  # fmt: skip
@in_loop
async def test_every_prompt_is_the_same_to_the_engine(asked, prompt):
    async with asked(World()) as here:
        await here.service.generate(request_of(prompt, seed=2**64 - 1, temperature=0.5))
        (spec,) = here.world.engine.submitted
        plain = World()
        await plain.service.generate(request_of(prompt, seed=2**64 - 1, temperature=0.5))
        assert (spec.prompt_ids, spec.sampling, spec.stopping) == (
            plain.engine.submitted[0].prompt_ids,
            plain.engine.submitted[0].sampling,
            plain.engine.submitted[0].stopping,
        )


@pytest.mark.parametrize("is_handed", [False, True], ids=["read", "handed"])
@in_loop
async def test_a_stream_has_all_chunks_in_order(asked, is_handed):
    async with asked(saying("a", "b", "c", num_alternatives=2)) as here:
        found: list[tuple[int, TokenChunk]] = []
        wanted = request_of(return_k_alternatives=2)
        async with await here.service.generate_stream(wanted) as stream:
            assert stream.request.num_prompt_tokens == 3
            assert (stream.request.num_sequences, stream.num_cached) == (1, 0)
            async for sequence, chunk in stream:
                found.append((sequence, chunk))
                if is_handed:
                    stream.hand_to(lambda sequence, chunk: found.append((sequence, chunk)))
            assert stream.is_done
            assert stream.num_generated == 3
        assert [chunk.tokens.texts for _, chunk in found] == [["a"], ["b"], ["c"]]
        assert [len(chunk.alternatives[0].ids) for _, chunk in found] == [2, 2, 2]
        assert found[-1][1].finish is FinishCode.LENGTH
        assert found[-1][1].generated_text == "abc"
        assert here.world.metric("lorax_request_success_total") == 1


@in_loop
async def test_the_sequences_of_a_stream_are_told_apart(asked):
    async with asked(World()) as here:
        ends: dict[int, str | None] = {}
        wanted = request_of(n=3, temperature=0.5, seed=2**64 - 2)
        async with await here.service.generate_stream(wanted) as stream:
            assert stream.seed == 2**64 - 2
            assert [stream.seed_of(each) for each in range(3)] == [2**64 - 2, 2**64 - 1, 0]
            async for sequence, chunk in stream:
                ends[sequence] = chunk.generated_text
        assert ends == dict.fromkeys(range(3), " w0 w1 w2")
        assert stream.num_generated == 9


@pytest.mark.parametrize("num", [1, 3])
@in_loop
async def test_what_a_stream_took_is_known_at_its_end(asked, num):
    async with asked(World()) as here:
        begun = perf_counter()
        async with await here.service.generate_stream(request_of(n=num, temperature=0.5)) as stream:
            async for _ in stream:
                pass
            took = stream.timings
        assert begun <= took.received_at <= took.validated_at <= took.scheduled_at
        assert took.scheduled_at <= took.first_token_at <= took.last_token_at <= perf_counter()
        assert took.total_s > 0
        assert stream.adapter is None


@in_loop
async def test_what_a_sink_raises_the_reader_gets(asked):
    def broken(sequence: int, chunk: TokenChunk) -> None:
        raise ZeroDivisionError

    world = World(engine=ScriptedEngine(delay_s=0.01))
    async with asked(world) as here:
        if here.service is world.service:
            pytest.skip("a scripted engine hands nothing over by itself")
        with pytest.raises(ZeroDivisionError):
            await read(here.service, request_of(max_new_tokens=20), sink=broken)
        await until(lambda: world.metric("lorax_request_failure_total", err="dropped") == 1)


ERRORS: list[LoraxError] = [
    GenerationError("row lost", public="a row was lost"),
    OverloadedError("no place", public=""),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda each: type(each).__name__)
@in_loop
async def test_an_error_is_what_it_was(asked, error):
    def script(spec: RequestSpec) -> Any:
        yield next(words("a", "b"))
        yield from failure(error)

    async with asked(World(engine=ScriptedEngine(script))) as here:
        with pytest.raises(type(error)) as found:
            await here.service.generate(request_of())
        assert (found.value.public, str(found.value)) == (error.public, str(error))
        chunks: list[TokenChunk] = []
        with pytest.raises(type(error)):
            await read(here.service, request_of(), chunks)
        # What came before it is handed out before it.
        assert [chunk.tokens.texts for chunk in chunks] == [["a"]]
        assert here.world.metric("lorax_request_count_total") == 2


@in_loop
async def test_what_cannot_be_is_refused_before_it_runs(asked):
    async with asked(World()) as here:
        for call in (here.service.generate, here.service.generate_stream):
            with pytest.raises(ValidationError, match="max_new_tokens"):
                await call(request_of(max_new_tokens=-1))
        assert here.world.engine.submitted == []
        assert here.world.metric("lorax_request_failure_total", err="validation") == 2


@in_loop
async def test_a_number_beyond_all_bounds_is_refused_in_words(asked):
    async with asked(World()) as here:
        for call in (here.service.generate, here.service.generate_stream):
            with pytest.raises(ValidationError):
                await call(request_of(logit_bias={2**70: 1.0}))
        await until(lambda: here.world.metric("lorax_request_count_total") == 2)
        assert here.world.metric("lorax_request_failure_total", err="validation") == 2


@in_loop
async def test_room_is_told_before_there_is_a_request(asked):
    async with asked(World()) as here:
        await here.service.ask_room(ANYBODY)
        here.world.engine.full = QueueFullError("as much as may", retry_after_s=9)
        with pytest.raises(QueueFullError) as found:
            await here.service.ask_room(Caller(tenant="ant"))
        assert found.value.kind.retry_after_s == 9
        here.world.engine.full = None
        here.world.service.stop_admitting()
        with pytest.raises(ShuttingDownError):
            await here.service.ask_room(ANYBODY)
        # Whoever asked counts what was refused, once.
        assert here.world.metric("lorax_request_count_total") == 0


@in_loop
async def test_tokens_are_counted(asked):
    async with asked(World()) as here:
        assert await here.service.count_tokens(request_of()) == 3
        assert here.world.engine.submitted == []


@in_loop
async def test_the_head_that_would_classify_a_text_is_told(asked):
    head = HeadFacts(pooling=Pooling.EACH, labels=("O", "B-A"), scores=ScoreKind.ANY_OF)
    for own in (None, head):
        async with asked(World(abilities=Abilities(head=own))) as here:
            assert await here.service.head_of(request_of()) == own
            assert here.world.engine.submitted == []


@in_loop
async def test_each_adapter_has_an_answer_or_what_is_wrong_with_it(asked):
    async with asked(World()) as here:
        names = [BASE_MODEL_ADAPTER_ID, "a", BASE_MODEL_ADAPTER_ID]
        first, refused, last = await here.service.generate_through(request_of(), names)
        assert first.texts == last.texts == (" w0 w1 w2",)
        assert isinstance(refused, ValidationError)
        assert "serves the base model only" in str(refused)
        assert here.world.metric("lorax_request_count_total") == 3
        assert here.world.metric("lorax_request_success_total") == 2


@in_loop
async def test_whoever_leaves_ends_the_request_through_all_adapters(asked):
    world = World()
    world.engine.open.clear()
    async with asked(world) as here:
        names = [BASE_MODEL_ADAPTER_ID] * 3
        calling = asyncio.create_task(here.service.generate_through(request_of(), names))
        await until(lambda: len(world.engine.submitted) == 3)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        await until(lambda: len(world.engine.cancelled) == 3)
        assert world.metric("lorax_request_failure_total", err="dropped") == 3


@pytest.mark.parametrize("is_stream", [False, True])
@in_loop
async def test_whoever_leaves_ends_the_request(asked, is_stream):
    world = World()
    world.engine.open.clear()
    async with asked(world) as here:

        async def call() -> None:
            if not is_stream:
                await here.service.generate(request_of())
                return
            async with await here.service.generate_stream(request_of()) as stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(call())
        await until(lambda: world.engine.submitted)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: world.engine.cancelled)
        await until(lambda: world.metric("lorax_request_failure_total", err="dropped") == 1)
        await asyncio.wait_for(world.service.wait_idle(), 10)


@in_loop
async def test_a_stream_that_is_closed_early_gives_its_place_back(asked):
    world = World(engine=ScriptedEngine(delay_s=0.01), max_concurrent_requests=1)
    async with asked(world) as here:
        long = request_of(max_new_tokens=20)
        async with await here.service.generate_stream(long) as stream:
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await until(lambda: world.engine.cancelled)
        await asyncio.wait_for(world.service.wait_idle(), 10)
        assert (await here.service.generate(request_of())).texts == (" w0 w1 w2",)


@in_loop
async def test_refusals_and_strange_fields_are_counted_where_the_metrics_are(asked):
    world = World()
    async with asked(world) as here:
        here.counts.request_refused(OverloadedError("no place", public=""), Caller(tenant="ant"))
        here.counts.request_refused(asyncio.CancelledError())
        here.counts.unknown_fields(0)
        here.counts.unknown_fields(4)
        await until(lambda: world.metric("lorax_request_unknown_fields_total") == 4)
        assert world.metric("lorax_request_count_total") == 2
        assert world.metric("lorax_request_failure_total", err="overloaded") == 1
        assert world.metric("lorax_request_failure_total", err="dropped") == 1


@in_loop
async def test_calls_at_once_do_not_mix(asked):
    async with asked(World(max_concurrent_requests=50)) as here:
        prompts = [TokenPrompt([number] * (1 + number % 9)) for number in range(40)]
        results = await asyncio.gather(
            *(here.service.generate(request_of(each)) for each in prompts)
        )
        assert [each.num_prompt_tokens for each in results] == [len(each.ids) for each in prompts]
