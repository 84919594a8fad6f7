"""The whole server, as clients see it: launcher, router and a shard with a tiny real model."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from tests.helpers.http_app import events
from tests.helpers.server import Server

PROMPT = "the quick brown fox"
TOKEN_KEYS = {"id", "text", "logprob", "special", "skipped"}
LIMIT = 2 * 1024 * 1024


@pytest.fixture(scope="module", params=["0", "2"], ids=["one process", "two fronts"])
def server(request: pytest.FixtureRequest, launch: Callable[..., Server]) -> Iterator[Server]:
    with launch("--http-workers", request.param) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def leaves_no_trace(http: httpx.Client) -> Iterator[None]:
    """Whatever a test did: the server is healthy after it and every KV block is free."""
    yield
    deadline = time.monotonic() + 20
    while (free := metric(http, "lorax_kv_blocks_free")) < metric(http, "lorax_kv_blocks"):
        assert time.monotonic() < deadline, f"only {free} blocks came back"
        time.sleep(0.02)
    assert http.get("/health").status_code == 200


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith((name + " ", name + "{"))
    )


def ask(http: httpx.Client, path: str = "/generate", inputs: str = PROMPT, **params: Any) -> Any:
    params = {"max_new_tokens": 8, "ignore_eos_token": True, "details": True, **params}
    return http.post(path, json={"inputs": inputs, "parameters": params})


def generate(http: httpx.Client, **params: Any) -> Any:
    response = ask(http, **params)
    assert response.status_code == 200, response.text
    return response.json()


def send(server: Server, data: bytes) -> bytes:
    """Everything the server answers to raw bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def raw_post(path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
    )
    return head.encode() + b"content-type: application/json\r\n\r\n" + body


# --- shapes -----------------------------------------------------------------------


def test_every_route_answers(http):
    for path in ("/", "/health", "/ping", "/startup"):
        answer = http.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    info = http.get("/info").json()
    assert (info["max_concurrent_requests"], info["max_total_tokens"]) == (48, 512)
    assert info["max_batch_total_tokens"] == 96 * 16
    (memory,) = info["memory"]["ranks"]
    assert {"weights", "activations", "adapters", "unused"} < memory.keys()
    assert memory["kv_cache"] % (96 * 16) == 0 < memory["kv_cache"]
    backends = info["backends"]
    assert backends.keys() == {"attention", "linear", "elementwise", "lora"}
    # What the shard chose, of what it computes by itself.
    assert backends["elementwise"] in {"cpp", "torch"}
    assert all(backends.values())
    assert http.get("/metrics").headers["content-type"].startswith("text/plain")
    as_json = http.get("/metrics", headers={"accept": "application/json"}).json()
    assert "lorax_kv_blocks" in as_json
    assert http.get("/docs").status_code == 200
    tokens = http.post("/tokenize", json={"inputs": PROMPT}).json()
    assert [PROMPT[token["start"] : token["stop"]] for token in tokens] == [
        t["text"] for t in tokens
    ]
    assert set(tokens[0]) == {"id", "text", "start", "stop"}


def test_a_whole_answer_has_lorax_s_shape_and_headers(http):
    response = ask(http, decoder_input_details=True)
    answer = response.json()
    details = answer["details"]
    assert set(answer) == {"generated_text", "details"}
    assert set(details) == {
        "finish_reason", "prompt_tokens", "generated_tokens", "skipped_tokens", "seed", "prefill",
        "tokens",
    }  # fmt: skip
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 8)
    assert (details["seed"], details["skipped_tokens"]) == (None, 0)
    assert all(set(token) == TOKEN_KEYS for token in details["tokens"])
    assert all(token["logprob"] <= 0 for token in details["tokens"])
    prefill = details["prefill"]
    assert len(prefill) == details["prompt_tokens"]
    assert prefill[0]["logprob"] is None
    assert all(token["logprob"] <= 0 for token in prefill[1:])
    assert "".join(token["text"] for token in prefill) == PROMPT
    headers = response.headers
    assert headers["x-prompt-tokens"] == str(len(prefill))
    assert headers["x-generated-tokens"] == "8"
    assert headers["x-total-tokens"] == str(len(prefill) + 8)
    assert headers["x-compute-characters"] == str(len(PROMPT))
    times = ("total", "validation", "queue", "inference", "time-per-token", "time-to-first-token")
    for name in times:
        assert headers[f"x-{name}" if "-" in name else f"x-{name}-time"].isdecimal()
    assert set(generate(http, details=False)) == {"generated_text"}


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_the_compat_routes_answer_with_an_array_or_with_events(http, path):
    alone = generate(http)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "ignore_eos_token": True}}
    (answer,) = http.post(path, json={**body, "stream": False}).json()
    assert answer == {"generated_text": alone["generated_text"]}
    found = events(http.post(path, json={**body, "stream": True}).text)
    assert found[-1]["generated_text"] == alone["generated_text"]


def test_a_stream_byte_by_byte(server, http):
    alone = generate(http)
    params = {"max_new_tokens": 8, "ignore_eos_token": True, "details": True}
    body = json.dumps({"inputs": PROMPT, "parameters": params}).encode()
    head, _, rest = send(server, raw_post("/generate_stream", body)).partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0] == b"http/1.1 200 ok"
    for line in (b"content-type: text/event-stream", b"cache-control: no-cache",
                 b"x-accel-buffering: no", b"transfer-encoding: chunked"):  # fmt: skip
        assert line in lines
    text = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        text += rest[: int(size, 16)]
        assert rest[int(size, 16) :][:2] == b"\r\n"
        rest = rest[int(size, 16) + 2 :]
    *parts, last = text.split(b"\n\n")
    assert last == b""
    assert all(part.startswith(b"data: {") and b"\n" not in part for part in parts)
    found = [json.loads(part[6:]) for part in parts]
    assert [event["token"] for event in found] == alone["details"]["tokens"]
    assert all(event["generated_text"] is event["details"] is None for event in found[:-1])
    assert found[-1]["generated_text"] == alone["generated_text"]
    assert found[-1]["details"] == {
        name: alone["details"][name]
        for name in ("finish_reason", "prompt_tokens", "generated_tokens", "skipped_tokens", "seed")
    }


# --- parameters -------------------------------------------------------------------


def test_a_seed_repeats_and_another_does_not(http):
    draws = [
        generate(http, seed=seed, do_sample=True, temperature=2.0, max_new_tokens=24)
        for seed in (7, 7, 8)
    ]
    assert [draw["details"]["seed"] for draw in draws] == [7, 7, 8]
    assert draws[0] == draws[1]
    assert draws[0]["generated_text"] != draws[2]["generated_text"]
    # A seed that the server drew is told, and repeats the output.
    open_seed = generate(http, do_sample=True, temperature=2.0)
    again = generate(http, do_sample=True, temperature=2.0, seed=open_seed["details"]["seed"])
    assert again == open_seed


def test_best_of_gives_the_likeliest_first(http):
    details = generate(http, best_of=2, do_sample=True, temperature=2.0)["details"]
    (other,) = details["best_of_sequences"]
    assert set(other) == {
        "generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens",
    }  # fmt: skip
    best_sum, other_sum = (sum(t["logprob"] for t in each["tokens"]) for each in (details, other))
    assert best_sum >= other_sum
    assert details["seed"] != other["seed"]


def test_a_stop_sequence_ends_the_text_and_stays_in_it(http):
    text = generate(http, max_new_tokens=40)["generated_text"]
    stop = text[5:8]
    answer = generate(http, max_new_tokens=40, stop=["never" * 9, stop])
    assert answer["details"]["finish_reason"] == "stop_sequence"
    kept = answer["generated_text"]
    assert stop in kept
    assert text.startswith(kept)
    assert len(kept) < len(text)


def test_alternatives_contain_the_greedy_choice(http):
    tokens = generate(http, return_k_alternatives=3)["details"]["tokens"]
    for token in tokens:
        assert set(token) == TOKEN_KEYS | {"alternative_tokens"}
        assert len(token["alternative_tokens"]) == 3
        assert token["alternative_tokens"][0]["id"] == token["id"]


def test_truncate_keeps_the_end_of_the_prompt(http):
    tokens = http.post("/tokenize", json={"inputs": PROMPT * 40}).json()
    tail = (PROMPT * 40)[tokens[-5]["start"] :]
    cut = generate(http, inputs=PROMPT * 40, truncate=5, decoder_input_details=True)["details"]
    assert cut["prompt_tokens"] == 5
    assert [token["id"] for token in cut["prefill"]] == [token["id"] for token in tokens[-5:]]
    assert "".join(token["text"] for token in cut["prefill"]) == tail


def test_full_text_and_chat_template(http):
    plain = generate(http)["generated_text"]
    assert generate(http, return_full_text=True)["generated_text"] == PROMPT + plain
    chat = generate(http, apply_chat_template=True, decoder_input_details=True)["details"]
    rendered = "".join(token["text"] for token in chat["prefill"])
    assert rendered == f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_limit_the_output_fills_the_context(http):
    details = generate(http, max_new_tokens=None)["details"]
    assert details["prompt_tokens"] + details["generated_tokens"] == 512


# --- bad input --------------------------------------------------------------------

BAD = {
    "not JSON": (b"{", 400),
    "deep JSON": (b'{"inputs": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "not UTF-8": (b'{"inputs": "\xff"}', 400),
    "no inputs": (b"{}", 422),
    "an empty prompt": (b'{"inputs": ""}', 422),
    "a wrong type": (b'{"inputs": "a", "parameters": {"max_new_tokens": "1"}}', 422),
    "a million wrong items": (
        b'{"inputs": "a", "parameters": {"stop_token_ids": [' + b'"",' * 600_000 + b"1]}}",
        422,
    ),
    "a prompt too long": (json.dumps({"inputs": "ab " * 2_000}).encode(), 422),
    "a budget that cannot fit": (b'{"inputs": "a", "parameters": {"max_new_tokens": 600}}', 422),
    "a budget beyond 64 bits": (b'{"inputs": "a", "parameters": {"max_new_tokens": 1e30}}', 422),
    "a line break in an id": (b'{"inputs": "a", "parameters": {"adapter_id": "a\\r\\nx: y"}}', 422),
    "an adapter that no source has": (
        b'{"inputs": "a", "parameters": {"adapter_id": "some/adapter"}}', 424
    ),
    "an adapter of a source that is off": (
        b'{"inputs": "a", "parameters": {"adapter_id": "a", "adapter_source": "local"}}', 422
    ),
    "too many stops": (b'{"inputs": "a", "parameters": {"stop": ["a","b","c","d","e"]}}', 422),
    "one byte too many": (b'{"inputs": "' + b"a" * (LIMIT - 13) + b'"}', 413),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_bad_input_gets_one_json_error_and_harms_nobody(server, http, name, path):
    content, status = BAD[name]
    # Of a body too large, its announcement is enough to be refused.
    answer = send(server, raw_post(path, content)[: 200 if status == 413 else None])
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert int(lines[0].split()[1]) == status
    assert b"content-type: application/json" in lines
    document = json.loads(body)
    assert set(document) == {"error", "error_type"}
    types = {422: "validation", 424: "generation"}
    assert document["error_type"] == types.get(status, "bad_request")
    assert not any(line.startswith(b"x: y") for line in lines)


def test_a_body_of_just_the_limit_is_read(server):
    body = b'{"inputs": "' + b"a" * (LIMIT - 14) + b'"}'
    assert len(body) == LIMIT
    answer = send(server, raw_post("/generate", body))
    # It is too long a prompt, not too large a body.
    assert answer.startswith(b"HTTP/1.1 422 ")


def test_a_slow_body_waits_alone(server, http):
    body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 1}}).encode()
    request = raw_post("/generate", body)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as slow:
        for start in range(0, len(request), 40):
            slow.sendall(request[start : start + 40])
            assert ask(http, max_new_tokens=1).status_code == 200
        assert slow.recv(12) == b"HTTP/1.1 200"


def test_unknown_fields_are_ignored_and_counted(http):
    before = metric(http, "lorax_request_unknown_fields")
    known = ask(http).json()
    extra = {
        "max_new_tokens": 8,
        "ignore_eos_token": True,
        "details": True,
        "top_n_tokens": 2,
        "no_such_field": None,
    }
    body = {"inputs": PROMPT, "parameters": extra, "model": "x"}
    assert http.post("/generate", json=body).json() == known
    assert metric(http, "lorax_request_unknown_fields") == before + 3
