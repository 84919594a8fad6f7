"""The routes that generate text, over a scripted engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from tests.helpers.http_app import World, events, limits
from tests.helpers.scripted_engine import ScriptedEngine, words

from lorax_contract.step import Alternatives, FinishCode, TokenColumns
from lorax_router.service.engine.port import TokenChunk


def post(path: str, body: Any, world: World | None = None, **headers: str) -> httpx.Response:
    """One call to a fresh application; a World is made inside the loop if none is given."""

    async def run() -> httpx.Response:
        async with (world or World()).client() as client:
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(run())


def test_generate_answers_with_the_text_alone():
    response = post("/generate", {"inputs": "w1", "parameters": {"max_new_tokens": 2}})
    assert response.status_code == 200
    assert response.json() == {"generated_text": " w0 w1"}
    assert response.headers["content-type"] == "application/json"


def test_details_have_lorax_s_shape():
    params = {"max_new_tokens": 2, "details": True, "decoder_input_details": True}
    params |= {"return_k_alternatives": 2, "do_sample": True, "seed": 2**64 - 1}
    document = post("/generate", {"inputs": "w1", "parameters": params}).json()
    details = document["details"]
    assert details["finish_reason"] == "length"
    assert (details["prompt_tokens"], details["generated_tokens"]) == (2, 2)
    assert (details["skipped_tokens"], details["seed"]) == (0, 2**64 - 1)
    assert details["prefill"] == [
        {"id": 900, "text": "p", "logprob": None},
        {"id": 1, "text": "p", "logprob": -1.0},
    ]
    assert details["tokens"][0] == {
        "id": 100,
        "text": " w0",
        "logprob": -0.5,
        "special": False,
        "skipped": False,
        "alternative_tokens": [
            {"id": 0, "text": "<0>", "logprob": 0.0},
            {"id": 1, "text": "<1>", "logprob": -0.1},
        ],
    }
    assert "best_of_sequences" not in details


def test_best_of_sequences_follow_the_best():
    params = {"best_of": 2, "do_sample": True, "max_new_tokens": 1, "details": True}
    details = post("/generate", {"inputs": "w1", "parameters": params}).json()["details"]
    (other,) = details["best_of_sequences"]
    assert set(other) == {
        "generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens",
    }  # fmt: skip
    assert other["seed"] != details["seed"]


def test_the_headers_tell_lengths_times_and_the_true_device():
    headers = post("/generate", {"inputs": "w1 ü", "parameters": {"max_new_tokens": 2}}).headers
    assert headers["x-compute-type"] == "cpu+optimized"
    assert headers["x-model-id"] == "tests/tiny"
    assert headers["x-compute-characters"] == "4"
    assert headers["x-prompt-tokens"] == "3"
    assert headers["x-generated-tokens"] == "2"
    assert headers["x-total-tokens"] == "5"
    assert headers["x-skipped-tokens"] == "0"
    for name in (
        "x-compute-time", "x-total-time", "x-validation-time", "x-queue-time", "x-inference-time",
        "x-time-per-token", "x-time-to-first-token", "x-time-per-output-token",
    ):  # fmt: skip
        assert headers[name].isdecimal()


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_the_compat_routes_answer_with_an_array_or_events(path):
    body = {"inputs": "w1", "parameters": {"max_new_tokens": 2}}
    assert post(path, body).json() == [{"generated_text": " w0 w1"}]
    assert post(path, {**body, "stream": False}).json() == [{"generated_text": " w0 w1"}]
    response = post(path, {**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream"
    assert len(events(response.text)) == 2


def test_a_stream_is_one_event_per_token_and_no_terminator():
    params = {"max_new_tokens": 3, "details": True}
    response = post("/generate_stream", {"inputs": "w1", "parameters": params})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-compute-characters"] == "2"
    assert "content-length" not in response.headers
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: {") and "\n" not in part for part in parts)
    first, _, last = (json.loads(part[6:]) for part in parts)
    assert first == {
        "token": {
            "id": 100, "text": " w0", "logprob": -0.5, "special": False, "skipped": False,
        },
        "generated_text": None,
        "details": None,
    }  # fmt: skip
    assert last["generated_text"] == " w0 w1 w2"
    assert last["details"] == {
        "finish_reason": "length",
        "prompt_tokens": 2,
        "generated_tokens": 3,
        "skipped_tokens": 0,
        "seed": None,
    }


def test_a_stream_without_details_ends_with_the_text_only():
    body = {"inputs": "w1", "parameters": {"max_new_tokens": 1}}
    (only,) = events(post("/generate_stream", body).text)
    assert (only["generated_text"], only["details"]) == (" w0", None)


def test_several_tokens_in_a_chunk_are_several_events():
    def script(spec):
        yield TokenChunk(TokenColumns([1, 2], [-1.0, -2.0], ["a", "b"], [False, False]))
        yield TokenChunk(
            TokenColumns([3, 4], [-1.0, -2.0], ["c", "d"], [False, True]),
            FinishCode.EOS_TOKEN,
            generated_text="abc",
        )

    async def run() -> str:
        async with World(engine=ScriptedEngine(script)).client() as client:
            return (await client.post("/generate_stream", json={"inputs": "w1"})).text

    found = events(asyncio.run(run()))
    assert [event["token"]["text"] for event in found] == ["a", "b", "c", "d"]
    assert [event["generated_text"] for event in found] == [None, None, None, "abc"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_full_text_puts_the_prompt_in_front(path):
    body = {"inputs": "w1", "parameters": {"max_new_tokens": 1, "return_full_text": True}}
    text = post(path, body).text
    assert '"generated_text":"w1 w0"' in text


def tokens_of(text: str) -> list[Any]:
    return json.loads(text)[0]["details"]["tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_logprob_is_never_null(stream):
    async def run() -> str:
        engine = ScriptedEngine(lambda spec: words("a", "b", logprob=float("nan")))
        body = {"inputs": "w1", "parameters": {"details": True}, "stream": stream}
        async with World(engine=engine).client() as client:
            return (await client.post("/", json=body)).text

    text = asyncio.run(run())
    assert "NaN" not in text
    assert '"logprob":null' not in text
    documents = events(text) if stream else [{"token": each} for each in tokens_of(text)]
    assert [each["token"]["logprob"] for each in documents] == [-3.4028234663852886e38] * 2


def test_output_that_is_not_unicode_is_repaired():
    def script(spec):
        yield TokenChunk(
            TokenColumns([1], [-1.0], ["a\ud800"], [False]),
            FinishCode.LENGTH,
            alternatives=[Alternatives([1], [-1.0], ["\udfff"])],
            generated_text="a\ud800",
        )

    async def run() -> httpx.Response:
        body = {"inputs": "w1", "parameters": {"details": True}}
        async with World(engine=ScriptedEngine(script)).client() as client:
            return await client.post("/generate", json=body)

    response = asyncio.run(run())
    assert response.status_code == 200
    assert response.json()["generated_text"] == "a?"


def test_a_body_as_lorax_s_client_sends_it():
    """Every parameter, the unset ones as explicit nulls."""
    names = (
        "adapter_id", "adapter_source", "merged_adapters", "api_token", "max_new_tokens",
        "repetition_penalty", "seed", "temperature", "top_k", "top_p", "truncate", "typical_p",
        "best_of", "return_k_alternatives", "response_format",
    )  # fmt: skip
    params: dict[str, Any] = dict.fromkeys(names)
    params |= {"do_sample": False, "return_full_text": False, "stop": [], "watermark": False}
    params |= {"details": True, "decoder_input_details": False, "ignore_eos_token": False}
    response = post("/", {"inputs": "w1", "parameters": params, "stream": False})
    assert response.status_code == 200
    assert response.json()[0]["details"]["generated_tokens"] == 28


def test_unknown_fields_are_ignored_and_counted():
    async def run() -> float:
        world = World()
        body = {"inputs": "w1", "extra": {"deep": [1]}, "parameters": {"top_n_tokens": 5, "x": 1}}
        async with world.client() as client:
            assert (await client.post("/generate", json=body)).status_code == 200
        return world.metric("lorax_request_unknown_fields_total")

    assert asyncio.run(run()) == 3


def test_the_chat_template_is_applied_on_request():
    async def run() -> list[int]:
        world = World()
        body = {"inputs": "w7", "parameters": {"apply_chat_template": True}}
        async with world.client() as client:
            await client.post("/generate", json=body)
        return list(world.engine.submitted[0].prompt_ids)

    assert asyncio.run(run()) == [902, 904, 903, 7, 902, 905, 903]


def test_w31_a_bearer_token_is_taken_for_nothing_that_the_base_model_needs(caplog):
    """LoRAX sends an OpenAI client's dummy key on to the hub, and logs it (W30)."""
    response = post("/generate", {"inputs": "w1"}, authorization="Bearer sk-dummy")
    assert response.status_code == 200
    assert "sk-dummy" not in response.text
    assert "sk-dummy" not in caplog.text


def test_a_model_name_cannot_break_headers():
    async def run() -> httpx.Response:
        world = World(model_id="/models/smöl\r\nx-evil: 1")
        async with world.client() as client:
            return await client.post("/generate", json={"inputs": "w1"})

    response = asyncio.run(run())
    assert response.headers["x-model-id"] == "/models/sm?l??x-evil: 1"
    assert "x-evil" not in response.headers


def test_w32_an_image_in_a_prompt_is_text_and_nothing_fetches_it():
    """LoRAX's router opens the address, in a tokenizer thread."""

    async def run() -> int:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal visits
            visits += 1
            writer.close()

        visits = 0
        world = World(bounds=limits(max_input_length=100, max_total_tokens=110))
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as trap:
            port = trap.sockets[0].getsockname()[1]
            body = {"inputs": f"![](http://127.0.0.1:{port}/a.png) w1"}
            async with world.client() as client:
                assert (await client.post("/generate", json=body)).status_code == 200
        assert world.engine.submitted[0].prompt_ids[-1] == 1
        return visits

    assert asyncio.run(run()) == 0
