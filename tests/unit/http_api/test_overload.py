"""Too much waits, or too little time is left: what each dialect's clients are told."""

from __future__ import annotations

import asyncio
import math
from time import perf_counter
from typing import Any

import httpx
import pytest
from tests.helpers.http_app import World, events
from tests.helpers.scripted_engine import ScriptedEngine, failure, words

from lorax_contract.errors import BusyError, DeadlineError, LoraxError, QueueFullError

CHAT = {"model": "tests/tiny", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 4}
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "w1"},
    "/generate_stream": {"inputs": "w1"},
    "/v1/completions": {"model": "tests/tiny", "prompt": "w1", "max_tokens": 4},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
}
OPENAI = [path for path in BODIES if path.startswith("/v1/c")]
LORAX = [path for path in BODIES if not path.startswith("/v1/")]
FULL = QueueFullError("3 requests of yours wait already", retry_after_s=17)
BUSY = BusyError(retry_after_s=23)
LATE = DeadlineError("the client gives it 1 s more")


async def post(world: World, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async with world.client() as client:
        return await client.post(path, json=BODIES[path], headers=headers)


def ask(path: str, error: LoraxError, *, early: bool = False) -> httpx.Response:
    """Send a request that the queue refuses, before or after its body is read."""

    async def run() -> httpx.Response:
        world = World()
        if early:
            world.engine.full = error
        else:
            world.engine.refusal = error
        response = await post(world, path)
        assert world.metric("lorax_request_count_total") == 1
        assert not world.engine.submitted
        return response

    return asyncio.run(run())


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("path", LORAX)
def test_loraxs_clients_are_told_whose_queue_is_full_and_when_to_come_back(
    path: str, early: bool
) -> None:
    own = ask(path, FULL, early=early)
    assert (own.status_code, own.headers["retry-after"]) == (429, "17")
    assert own.json() == {
        "error": "Quota exceeded: 3 requests of yours wait already", "error_type": "quota",
    }  # fmt: skip
    of_all = ask(path, BUSY, early=early)
    assert (of_all.status_code, of_all.headers["retry-after"]) == (503, "23")
    assert of_all.json()["error_type"] == "overloaded"
    assert "try again in 23 seconds" in of_all.json()["error"]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("path", OPENAI)
def test_openais_clients_get_a_rate_limit_or_a_server_that_is_unavailable(
    path: str, early: bool
) -> None:
    own = ask(path, FULL, early=early)
    assert (own.status_code, own.headers["retry-after"]) == (429, "17")
    assert own.json()["error"]["type"] == "rate_limit_error"
    of_all = ask(path, BUSY, early=early)
    assert (of_all.status_code, of_all.headers["retry-after"]) == (503, "23")
    assert of_all.json()["error"]["code"] == "service_unavailable"


@pytest.mark.parametrize("early", [False, True])
def test_anthropics_clients_get_429_for_their_own_queue_and_529_for_that_of_all(
    early: bool,
) -> None:
    own = ask("/v1/messages", FULL, early=early)
    assert (own.status_code, own.headers["retry-after"]) == (429, "17")
    assert own.json()["error"]["type"] == "rate_limit_error"
    of_all = ask("/v1/messages", BUSY, early=early)
    assert (of_all.status_code, of_all.headers["retry-after"]) == (529, "23")
    assert of_all.json()["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize("path", BODIES)
def test_who_would_be_too_late_gets_504_in_words_and_is_not_made_to_try_again(path: str) -> None:
    response = ask(path, LATE)
    assert response.status_code == 504
    # What SDKs go by that send again whatever got a 5xx.
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers
    assert "the client gives it 1 s more" in response.text
    document = response.json()
    if path in LORAX:
        assert document["error_type"] == "deadline"
    elif path in OPENAI:
        assert document["error"]["code"] == "deadline_exceeded"
    else:
        assert document["error"]["type"] == "timeout_error"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-request-timeout": "2.5"}, 2.5),
        ({"x-envoy-expected-rq-timeout-ms": "1500"}, 1.5),
        ({"x-request-timeout": "2.5", "x-envoy-expected-rq-timeout-ms": "9000"}, 2.5),
        ({}, math.inf),
    ],
)
def test_a_heads_timeout_is_the_deadline_of_its_request(
    path: str, headers: dict[str, str], seconds: float
) -> None:
    async def run() -> None:
        world, before = World(), perf_counter()
        assert (await post(world, path, headers)).status_code == 200
        (terms,) = world.engine.terms
        assert before + seconds <= terms.deadline <= perf_counter() + seconds

    asyncio.run(run())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_timeout_that_is_none_is_a_bad_request_that_names_the_header(
    path: str, text: str
) -> None:
    response = asyncio.run(post(World(), path, {"x-request-timeout": text}))
    assert response.status_code == 400
    assert "x-request-timeout must be a number above 0" in response.text


def test_a_stream_whose_time_is_over_ends_with_an_event_that_says_so() -> None:
    def script(spec: Any) -> Any:
        yield next(words("a", "b"))
        yield from failure(LATE)

    async def run() -> httpx.Response:
        return await post(World(engine=ScriptedEngine(script)), "/generate_stream")

    first, error = events(asyncio.run(run()).text)
    assert first["token"]["text"] == "a"
    assert error["error_type"] == "deadline"


@pytest.mark.parametrize(
    ("error", "reason"), [(FULL, "queue_full"), (BUSY, "overloaded"), (LATE, "deadline")]
)
def test_what_is_rejected_is_counted_by_its_reason(error: LoraxError, reason: str) -> None:
    async def run() -> None:
        world = World()
        world.engine.full = error
        await post(world, "/generate")
        labels = {"tenant": "", "reason": reason}
        assert world.metric("lorax_request_rejected_total", **labels) == 1
        assert world.metric("lorax_request_failure_total", err=reason) == 1

    asyncio.run(run())
