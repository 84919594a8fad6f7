"""Each request has one line in the log, whatever its end, its dialect and the process that has its client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import httpx
import pytest
from tests.helpers.dialects import DIALECTS, Dialect
from tests.helpers.fronts import closing, front_of
from tests.helpers.grpc_calls import grpc_served, refused
from tests.helpers.http_app import World, until
from tests.helpers.in_loop import in_loop
from tests.helpers.scripted_engine import ScriptedEngine, failure, words

from lorax_contract.errors import GenerationError, OverloadedError, QueueFullError
from lorax_proto import lorax_pb2 as pb
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt

Client = Callable[[World], Any]
MODEL_ID = "fake"
SECRET = "w17"


@contextlib.asynccontextmanager
async def in_core(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with world.client() as client:
        yield client


@contextlib.asynccontextmanager
async def in_front(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with closing(front_of(world)) as pair, pair.client() as client:
        yield client


@pytest.fixture(params=[in_core, in_front], ids=["core", "front"])
def http(request: pytest.FixtureRequest) -> Client:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[World], list[dict[str, Any]]]:
    """The fields of all lines so far, which are as many as the requests that the metrics know."""
    caplog.set_level("INFO", "lorax_router.request")

    def read(world: World) -> list[dict[str, Any]]:
        found = [each for each in caplog.records if each.name == "lorax_router.request"]
        fields: list[dict[str, Any]] = [each.fields for each in found]  # type: ignore[attr-defined]
        num = world.metric("lorax_request_count_total")
        assert sum(each.get("requests", 1) for each in fields) == num
        assert SECRET not in repr(fields)
        return fields

    return read


def asking(**parameters: Any) -> GenerateRequest:
    return GenerateRequest(prompt=TextPrompt("w1"), parameters=GenerateParameters(**parameters))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_each_end_of_each_dialect_has_one_line(
    http: Client, lines: Any, dialect: Dialect, stream: bool
) -> None:
    @in_loop
    async def scene() -> None:
        world = World(model_id=MODEL_ID)
        async with http(world) as client:
            path, body = dialect.asked({}, stream=stream)

            async def post(**given: Any) -> dict[str, Any]:
                num = len(lines(world))
                await client.post(path, **given)
                await until(lambda: len(lines(world)) > num)
                (line,) = lines(world)[num:]
                assert (line["protocol"], line["call"]) == ("http", path)
                return line

            line = await post(json=body)
            assert (line["outcome"], line["status"], line["stream"]) == ("ok", "OK", stream)
            assert (line["generated_tokens"], line["finish_reason"]) == (2, "length")
            line = await post(content=b"{", headers={"content-type": "application/json"})
            assert (line["outcome"], line["status"]) == ("bad_request", "INVALID_ARGUMENT")
            line = await post(json=body, headers={"x-priority": "urgent"})
            assert line["outcome"] == "bad_request"
            line = await post(
                json={**body, "temperature": -3.0, "parameters": {"temperature": -3.0}}
            )
            assert line["outcome"] == "validation"
            if "model" in body:
                line = await post(json={**body, "model": "of nobody"})
                assert line["outcome"] == "validation"
            world.engine.full = QueueFullError("too much waits")
            assert (await post(json=body))["outcome"] == "queue_full"
            world.engine.full = None
            world.engine.script = lambda spec: failure(GenerationError("broke"))
            line = await post(json=body)
            assert (line["outcome"], line["error"]) == ("generation", "broke")
            world.engine.refusal = ZeroDivisionError("a fault of ours")
            line = await post(json=body)
            assert (line["outcome"], line["status"]) == ("internal", "INTERNAL")
            world.engine.refusal = None
            world.service.stop_admitting()
            line = await post(json=body)
            assert (line["outcome"], line["status"]) == ("shutting_down", "UNAVAILABLE")

    scene()


@in_loop
async def test_prompts_of_one_body_have_a_line_each_and_answers_of_one_prompt_have_one(
    http: Client, lines: Any
) -> None:
    world = World(model_id=MODEL_ID)
    async with http(world) as client:
        body = {"model": MODEL_ID, "prompt": ["w1", "w2", "w3"], "max_tokens": 2}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert [each["sequences"] for each in lines(world)] == [1, 1, 1]
        body = {"model": MODEL_ID, "prompt": "w1", "n": 2, "max_tokens": 2, "temperature": 1}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        (line,) = lines(world)[3:]
        assert (line["sequences"], line["generated_tokens"]) == (2, 4)


@in_loop
async def test_what_the_caller_says_of_it_is_in_the_line(http: Client, lines: Any) -> None:
    world = World(model_id=MODEL_ID)
    async with http(world) as client:
        for given, found in (("mine-7", "mine-7"), ("no id" * 40, None)):
            headers = {"x-request-id": given, "authorization": f"Bearer {SECRET}"}
            body = {"inputs": SECRET, "parameters": {"max_new_tokens": 2}}
            assert (await client.post("/generate", json=body, headers=headers)).status_code == 200
            assert lines(world)[-1].get("request_id") == found
        # Nothing is traced where nobody asked for it.
        assert "trace_id" not in lines(world)[-1]


@in_loop
async def test_who_leaves_has_a_line(lines: Any) -> None:
    world = World(engine=ScriptedEngine(lambda spec: words(" w1", " w2", " w3")))
    stream = await world.service.generate_stream(asking())
    await anext(stream)
    await stream.aclose()
    world.engine.open.clear()
    waiting = asyncio.create_task(world.service.generate(asking()))
    await until(lambda: len(world.engine.submitted) == 2)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with await world.service.generate_stream(asking()):
        """It reads nothing."""
    assert [each["outcome"] for each in lines(world)] == ["dropped"] * 3
    assert {each["status"] for each in lines(world)} == {"CANCELLED"}
    assert lines(world)[0]["generated_tokens"] == 1
    # It was in the queue until it left.
    assert "queue_ms" in lines(world)[1] and "prefill_ms" not in lines(world)[1]


@in_loop
async def test_each_end_of_a_call_over_grpc_has_one_line(lines: Any) -> None:
    world = World()
    async with grpc_served(world) as served:
        stub, two = served.stub, pb.Parameters(max_new_tokens=2)
        mine = (("x-request-id", "mine"),)
        await stub.Generate(pb.GenerateRequest(text="w1", parameters=two), metadata=mine)
        async for _ in stub.GenerateStream(pb.GenerateRequest(text="w1", parameters=two)):
            pass
        chat = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="w1")], parameters=two)
        await stub.Chat(chat)
        async for _ in stub.ChatStream(chat):
            pass
        await refused(stub.Generate(pb.GenerateRequest()))
        await refused(
            stub.Generate(pb.GenerateRequest(text="w1", parameters=pb.Parameters(stop=["w"] * 99)))
        )
        world.engine.full = OverloadedError("no place", public="")
        await refused(stub.Generate(pb.GenerateRequest(text="w1")))
        world.engine.full = None
        world.engine.open.clear()
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(pb.GenerateRequest(text="w1"), timeout=0.2)
        await until(lambda: len(lines(world)) == 8)
    found = lines(world)
    calls = ["Generate", "GenerateStream", "Chat", "ChatStream", *["Generate"] * 4]
    assert [(each["protocol"], each["call"]) for each in found] == [
        ("grpc", each) for each in calls
    ]
    assert found[0]["request_id"] == "mine"
    outcomes = [each["outcome"] for each in found]
    assert outcomes[:7] == ["ok"] * 4 + ["validation"] * 2 + ["overloaded"]
    assert outcomes[7] in ("deadline", "dropped")


@in_loop
async def test_a_flood_of_refusals_has_few_lines_which_count_them_all(lines: Any) -> None:
    world = World()
    async with world.client() as client:
        world.engine.full = OverloadedError("no place", public="")
        for _ in range(120):
            assert (await client.post("/generate", json={"inputs": "w1"})).status_code == 429
        world.service.ledger.close()
        found = lines(world)
        assert 20 < len(found) < 120
        assert max(each.get("requests", 1) for each in found) > 1
        assert {each["outcome"] for each in found} == {"overloaded"}
