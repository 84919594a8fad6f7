"""What bad requests get: JSON with a reason, the right status, and nothing else harmed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.helpers.http_app import World, events
from tests.helpers.scripted_engine import ScriptedEngine, failure, words

from lorax_contract.errors import GenerationError, ShardUnavailableError

JSON = {"content-type": "application/json"}
GENERATING = (
    "/", "/invocations", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions",
    "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
)  # fmt: skip
POSTS = ("/", "/invocations", "/generate", "/generate_stream", "/tokenize")


def send(path: str, content: bytes, headers: dict[str, str] = JSON) -> httpx.Response:
    async def run() -> httpx.Response:
        world = World()
        async with world.client() as client:
            response = await client.post(path, content=content, headers=headers)
            # Whatever it was, the next request is served.
            assert (await client.post("/generate", json={"inputs": "w1"})).status_code == 200
            assert world.engine.cancelled == []
        return response

    return asyncio.run(run())


def check(response: httpx.Response, status: int, error_type: str) -> str:
    """The error text, after the shape of the error was checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert set(document) == {"error", "error_type"}
    assert document["error_type"] == error_type
    return str(document["error"])


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"inputs": "w1"} trailing',
        b'{"inputs": "\xff\xfe"}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "w1", "deep": ' + b"[" * 4000 + b"]" * 4000 + b"}",
        b'{"inputs": "w1", "huge": ' + b"9" * 6000 + b"}",
    ],
)
def test_what_is_not_json_is_a_bad_request(path, content):
    text = check(send(path, content), 400, "bad_request")
    assert text.startswith("the body is not valid JSON: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'\xef\xbb\xbf{"inputs": "w1"}', "byte order mark; send UTF-8 without one"),
        ('{"inputs": "w1"}'.encode("utf-16"), "encoded in UTF-16; send UTF-8"),
        (b'{"inputs": "\xff"}', "it is not UTF-8 throughout"),
        (b'{"inputs": "\\ud800"}', "half of a character"),
        (b'{"inputs": "\\ud800 and more text"}', "half of a character"),
        (b'{"inputs": "\\udc00 and more text"}', "half of a character"),
        (b'{"\\ud800": 1, "inputs": "w1"}', "half of a character"),
    ],
)
def test_what_people_run_into_is_said_in_plain_words(content, words):
    assert words in check(send("/generate", content), 400, "bad_request")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ([], "the body"),
        ("w1", "the body"),
        ({}, "`inputs`: field required"),
        ({"inputs": None}, "`inputs`"),
        ({"inputs": 5}, "`inputs`"),
        ({"inputs": ["w1"]}, "`inputs`"),
        ({"inputs": "w1", "parameters": 5}, "`parameters`"),
        ({"inputs": "w1", "parameters": {"max_new_tokens": "5"}}, "`parameters.max_new_tokens`"),
        ({"inputs": "w1", "parameters": {"max_new_tokens": 1.5}}, "`parameters.max_new_tokens`"),
        ({"inputs": "w1", "parameters": {"max_new_tokens": True}}, "`parameters.max_new_tokens`"),
        ({"inputs": "w1", "parameters": {"seed": 10**30}}, "`parameters.seed`"),
        ({"inputs": "w1", "parameters": {"temperature": "hot"}}, "`parameters.temperature`"),
        ({"inputs": "w1", "parameters": {"stop": "x"}}, "`parameters.stop`"),
        ({"inputs": "w1", "parameters": {"stop": ["x", 1]}}, "`parameters.stop.1`"),
        ({"inputs": "w1", "parameters": {"details": "yes"}}, "`parameters.details`"),
        ({"inputs": "w1", "parameters": {"merged_adapters": {}}}, "merged_adapters.ids`"),
    ],
)
def test_wrong_types_are_refused_by_field(body, named):
    text = check(send("/generate", json.dumps(body).encode()), 422, "validation")
    assert named in text


@pytest.mark.parametrize("field", ["stop", "stop_token_ids", "merged_adapters.ids"])
def test_of_many_bad_items_the_first_is_told(field):
    """To describe each of the items that fit 2 MB would hold all streams up for seconds."""
    outer, _, inner = field.partition(".")
    items: Any = [None] * 1_000
    body = {"inputs": "w1", "parameters": {outer: {inner: items} if inner else items}}
    text = check(send("/generate", json.dumps(body).encode()), 422, "validation")
    assert f"`parameters.{field}.0`" in text
    assert "more" not in text


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_that_are_not_finite_are_refused(number):
    content = b'{"inputs": "w1", "parameters": {"temperature": ' + number + b"}}"
    assert "temperature" in check(send("/generate", content), 422, "validation")


def test_many_faults_are_told_briefly():
    body = {"parameters": dict.fromkeys(("top_k", "top_p", "seed", "best_of", "details"), "x")}
    text = check(send("/generate", json.dumps(body).encode()), 422, "validation")
    assert text.endswith("; and 3 more")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/xml+x"]
)
def test_other_content_types_are_refused(path, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    response = send(path, b'{"inputs": "w1"}', headers)
    assert "application/json" in check(response, 415, "bad_request")


@pytest.mark.parametrize(
    "content_type",
    ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"],
)
def test_forms_of_the_json_content_type(content_type):
    assert send("/generate", b'{"inputs": "w1"}', {"content-type": content_type}).status_code == 200


def test_a_body_too_large_is_refused_by_its_header():
    content = b'{"inputs": "' + b"w" * 20_000 + b'"}'
    assert "10000 bytes" in check(send("/generate", content), 413, "bad_request")


def test_a_body_too_large_is_not_read_to_its_end():
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            assert read < 100
            yield b" " * 1000

    async def run() -> httpx.Response:
        async with World().client() as client:
            return await client.post("/generate", content=endless(), headers=JSON)

    check(asyncio.run(run()), 413, "bad_request")
    assert read <= 12


@pytest.mark.parametrize(
    ("method", "path", "status", "error_type"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/generate/", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/", 405, "method_not_allowed"),
        ("GET", "/a%00b%0d%0a", 404, "not_found"),
    ],
)
def test_unknown_routes_and_methods(method, path, status, error_type):
    async def run() -> httpx.Response:
        async with World().client() as client:
            return await client.request(method, path)

    check(asyncio.run(run()), status, error_type)


def ask(world: World, path: str, **params: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with world.client() as client:
            return await client.post(path, json={"inputs": "w1", "parameters": params})

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"max_new_tokens": 29}, "at most 30"),
        ({"best_of": 5}, "best_of"),
        ({"adapter_id": "x/y"}, "base model only"),
        ({"adapter_id": "x\ny"}, "control characters"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_values_out_of_bounds_are_422(params, named):
    text = check(ask(World(), "/generate", **params), 422, "validation")
    assert text.startswith("Input validation error: ")
    assert named in text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_w2_a_control_character_in_an_id_fails_that_request_alone(path):
    """LoRAX ends when it writes the id into a header of the stream."""
    response = ask(World(), path, adapter_id="x\r\nset-cookie: a")
    check(response, 422, "validation")
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    "params",
    [
        {"best_of": 2, "do_sample": True},
        {"best_of": 0},
        {"decoder_input_details": True},
        {"max_new_tokens": 0},
        {"max_new_tokens": 1000},
    ],
)
def test_a_stream_that_cannot_begin_gets_the_status_of_its_error(params):
    check(ask(World(), "/generate_stream", **params), 422, "validation")


def test_a_stream_that_fails_before_its_first_token_gets_the_status_too():
    world = World(engine=ScriptedEngine(lambda spec: failure(GenerationError("row failed"))))
    check(ask(world, "/generate_stream"), 424, "generation")


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_overload_is_429_and_says_when_to_come_again(path):
    response = ask(World(max_concurrent_requests=0), path)
    assert check(response, 429, "overloaded") == "Model is overloaded"
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("drains", [False, True])
def test_what_no_body_could_change_is_said_before_the_body_is_read(path, drains, caplog):
    """Reading and parsing bodies of others is what an overloaded server has no time for."""

    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the body was asked for")
        yield b""

    async def run() -> httpx.Response:
        world = World(max_concurrent_requests=8 if drains else 0)
        if drains:
            world.service.stop_admitting()
        async with world.client() as client:
            response = await client.post(path, content=unread(), headers=JSON)
        label = "shutting_down" if drains else "overloaded"
        assert world.metric("lorax_request_failure_total", err=label) == 1
        assert world.metric("lorax_request_count_total") == 1
        return response

    with caplog.at_level(logging.INFO, "lorax_router"):
        response = asyncio.run(run())
    # One that is alone has its own line; a flood of them is no flood of the log.
    own = [each for each in caplog.records if each.name.startswith("lorax_router")]
    assert [(each.name, each.levelname) for each in own] == [("lorax_router.request", "INFO")]
    # Anthropic's SDKs know it by a number of their own.
    is_529 = path.startswith("/v1/messages")
    assert response.status_code == (529 if is_529 else 503 if drains else 429)
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]


def test_a_missing_chat_template_is_422():
    world = World(template=None)
    check(ask(world, "/generate", apply_chat_template=True), 422, "template_error")


def test_a_failure_in_a_shard_is_424():
    world = World(engine=ScriptedEngine(lambda spec: failure(GenerationError("row failed"))))
    text = check(ask(world, "/generate"), 424, "generation")
    assert text == "Request failed during generation: row failed"


def test_what_went_on_between_router_and_shard_stays_inside():
    world = World()
    world.engine.refusal = ShardUnavailableError("unix:/run/secret is gone")
    for path in ("/generate", "/generate_stream"):
        assert "secret" not in check(ask(world, path), 424, "generation")


def test_an_error_in_mid_stream_ends_it_with_one_event():
    def script(spec):
        yield next(words("a", "b"))
        yield from failure(GenerationError("row failed"))

    first, error = events(ask(World(engine=ScriptedEngine(script)), "/generate_stream").text)
    assert first["token"]["text"] == "a"
    assert error["error_type"] == "generation"


def test_a_stream_that_breaks_off_is_incomplete():
    world = World(engine=ScriptedEngine(lambda spec: iter([next(words("a", "b"))])))
    check(ask(world, "/generate"), 500, "incomplete_generation")
    assert events(ask(world, "/generate_stream").text)[-1] == {
        "error": "Incomplete generation",
        "error_type": "incomplete_generation",
    }


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_bug_shows_nothing_of_the_inside(path, caplog):
    world = World()
    world.engine.refusal = RuntimeError("secret detail")
    response = ask(world, path)
    assert "secret" not in response.text
    assert '"error_type":"internal"' in response.text
    assert response.status_code == 500
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_a_draining_server_answers_503(path):
    world = World()
    world.service.stop_admitting()
    response = ask(world, path)
    check(response, 503, "shutting_down")
    assert int(response.headers["retry-after"]) > 0


def test_bodies_that_are_refused_are_counted_as_requests_and_as_failures():
    async def run() -> tuple[float, float]:
        world = World()
        async with world.client() as client:
            await client.post("/generate", content=b"{", headers=JSON)
            await client.post("/generate", json={"inputs": 5})
        assert world.metric("lorax_request_count_total") == 2
        return (
            world.metric("lorax_request_failure_total", err="bad_request"),
            world.metric("lorax_request_failure_total", err="validation"),
        )

    assert asyncio.run(run()) == (1, 1)


def test_a_request_value_is_never_shown_in_a_type_error():
    body = {"inputs": "w1", "parameters": {"api_token": ["hf_secret"]}}
    text = check(send("/generate", json.dumps(body).encode()), 422, "validation")
    assert "hf_secret" not in text
