"""Tokens of texts and chats, and texts of tokens: LoRAX's bodies and vLLM's."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest
from tests.helpers.http_app import World, limits

from lorax_router.http_api import tokenizer_routes
from lorax_router.http_api.lorax.encode import spans_json
from lorax_router.service.prompts.tokenizer_pool import TokenSpan


def post(path: str, body: Any, **bounds: int) -> httpx.Response:
    async def run() -> httpx.Response:
        world = World(bounds=limits(**bounds), max_body_bytes=100_000)
        async with world.client() as client:
            return await client.post(path, json=body)

    return asyncio.run(run())


def tokenize(body: Any, **bounds: int) -> httpx.Response:
    async def run() -> httpx.Response:
        world = World(max_body_bytes=100_000, bounds=limits(**bounds))
        async with world.client() as client:
            return await client.post("/tokenize", json=body)

    return asyncio.run(run())


def test_tokenize_tells_ids_and_places():
    assert tokenize({"inputs": "w1 w22"}).json() == [
        {"id": 900, "text": "", "start": 0, "stop": 0},
        {"id": 1, "text": "w1", "start": 0, "stop": 2},
        {"id": 22, "text": "w22", "start": 3, "stop": 6},
    ]
    without = tokenize({"inputs": "w1", "add_special_tokens": False}).json()
    assert [token["id"] for token in without] == [1]
    assert tokenize({"inputs": "", "add_special_tokens": False}).json() == []


def test_a_text_too_long_is_refused_before_it_is_tokenized():
    answer = tokenize({"inputs": "w1 w2 w"}, max_input_chars=6)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert "at most 6 characters, got 7" in answer.json()["error"]
    assert len(tokenize({"inputs": "w1 w2 "}, max_input_chars=6).json()) == 3


@pytest.mark.parametrize("num", [1_000, 2_345])
def test_a_long_text_is_answered_whole_and_written_off_the_event_loop(num, monkeypatch):
    threads = []

    def spied(spans: list[TokenSpan]) -> bytes:
        threads.append(threading.current_thread())
        return spans_json(spans)

    monkeypatch.setattr(tokenizer_routes, "spans_json", spied)
    body = {"inputs": " ".join(f"w{i % 900}" for i in range(num)), "add_special_tokens": False}
    tokens = tokenize(body).json()
    assert [token["id"] for token in tokens] == [i % 900 for i in range(num)]
    assert all(body["inputs"][t["start"] : t["stop"]] == t["text"] for t in tokens)
    assert threading.main_thread() not in threads
    assert len(threads) == 1


# --- vLLM's bodies -------------------------------------------------------------------------


def test_a_prompt_is_answered_with_its_ids():
    assert post("/tokenize", {"prompt": "w1 w22"}).json() == {
        "count": 3, "max_model_len": 30, "tokens": [900, 1, 22], "token_strs": None,
    }  # fmt: skip
    body = {"prompt": "w1", "add_special_tokens": False, "return_token_strs": True}
    answer = post("/tokenize", {**body, "model": "tests/tiny"}).json()
    assert (answer["tokens"], answer["token_strs"]) == ([1], ["w1"])


def test_a_chat_is_answered_with_the_ids_of_what_the_template_makes_of_it():
    body = {"messages": [{"role": "user", "content": "w1 w2"}], "return_token_strs": True}
    strings = post("/tokenize", body).json()["token_strs"]
    assert {"user", "w1", "w2", "assistant"} <= set(strings)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "one of `inputs`, `prompt` and `messages`"),
        ({"inputs": None}, "one of `inputs`, `prompt` and `messages`"),
        ({"inputs": "w1", "prompt": "w1"}, "got `inputs` and `prompt`"),
        ({"prompt": ""}, "`prompt` must not be empty"),
        ({"messages": []}, "`messages` must not be empty"),
        ({"prompt": "w1 w2 w3"}, "`prompt` must have at most 6 characters"),
        ({"prompt": 1}, "`prompt`"),
        ({"messages": ["w1"]}, "`messages.0`"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_the_name_of_its_field(body, words):
    answer = post("/tokenize", body, max_input_chars=6)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert words in answer.json()["error"]


def test_ids_become_the_text_they_stand_for():
    assert post("/detokenize", {"tokens": [1, 22]}).json() == {"prompt": "w1 w22"}
    assert post("/detokenize", {"tokens": [], "model": "tests/tiny"}).json() == {"prompt": ""}
    there = post("/tokenize", {"prompt": "w5 w6 w7"}).json()["tokens"]
    assert post("/detokenize", {"tokens": there}).json() == {"prompt": "<s> w5 w6 w7"}


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([1, 906], "906 is not a token of this model, whose ids go from 0 to 905"),
        ([-1], "-1 is not a token"),
        ([2**70], "`tokens.0`"),
        (["1"], "`tokens.0`"),
        ([1.5], "`tokens.0`"),
        ([True], "`tokens.0`"),
        (None, "`tokens`"),
        ([1] * 7, "`tokens` must have at most 6 ids"),
    ],
)
def test_ids_of_no_token_are_refused_in_words(tokens, words):
    answer = post("/detokenize", {"tokens": tokens}, max_input_chars=6)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert words in answer.json()["error"]
