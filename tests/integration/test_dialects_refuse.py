"""Fields of other dialects, and errors of our own: each is told in the dialect's envelope."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from tests.helpers.adapter_world import adapter_world
from tests.helpers.asking import Asking, play
from tests.helpers.dialects import (
    CHAT,
    COMPLETIONS,
    DIALECTS,
    MESSAGES,
    RESPONSES,
    Dialect,
    events_of,
)
from tests.helpers.http_app import TEMPLATE

from lorax_contract.errors import GenerationError
from lorax_router.http_api import sse

# --- unknown fields ---------------------------------------------------------------

# What other dialects and servers honour, with a value that would change the answer.
CHANGING: dict[Dialect, dict[str, Any]] = {
    COMPLETIONS: {
        "suffix": "x", "prompt_embeds": "AAAA", "allowed_token_ids": [1], "bad_words": ["x"],
        "length_penalty": 2.0, "use_beam_search": True, "prompt_logprobs": 1,
        "logits_processors": ["x"], "max_new_tokens": 1, "watermark": True,
        "return_full_text": True, "merged_adapters": {"ids": ["a"]}, "max_completion_tokens": 1,
        "messages": [{"role": "user", "content": "w1"}], "instructions": "x", "system": "x",
        "truncate": 1, "return_token_ids": True, "return_tokens_as_token_ids": True,
        "spaces_between_special_tokens": False,
    },
    CHAT: {
        "functions": [{"name": "f"}], "function_call": {"name": "f"}, "audio": {"voice": "x"},
        "modalities": ["audio"], "web_search_options": {"x": 1}, "verbosity": "low",
        "best_of": 2, "echo": True, "chat_template": "{{ 1 }}", "prompt": "x",
        "instructions": "x", "system": "x", "max_new_tokens": 1, "stop_sequences": ["x"],
        "thinking": {"type": "enabled"}, "add_special_tokens": True, "include_reasoning": False,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "suffix": "x",
        "prompt_logprobs": 1, "length_penalty": 2.0, "use_beam_search": True,
    },
    RESPONSES: {
        "previous_response_id": "x", "conversation": "x", "background": True, "prompt": {"id": "x"},
        "truncation": "auto", "top_logprobs": 2, "max_tokens": 1, "messages": [{"role": "user"}],
        "stop": ["x"], "n": 2, "frequency_penalty": 1.0, "presence_penalty": 1.0,
        "logit_bias": {"1": 1}, "response_format": {"type": "json_object"}, "system": "x",
        "repetition_penalty": 2.0, "min_p": 0.5, "guided_json": {"type": "object"},
        "chat_template": "{{ 1 }}",
    },
    MESSAGES: {
        "container": "x", "mcp_servers": [{"x": 1}], "context_management": {"x": 1},
        "output_format": {"type": "json_schema"}, "stop": ["x"], "n": 2, "seed": 1,
        "frequency_penalty": 1.0, "presence_penalty": 1.0, "repetition_penalty": 2.0, "min_p": 0.5,
        "logit_bias": {"1": 1}, "response_format": {"type": "json_object"}, "max_new_tokens": 1,
        "max_completion_tokens": 1, "instructions": "x", "guided_json": {"type": "object"},
        "chat_template": "{{ 1 }}", "functions": [{"name": "f"}],
    },
}  # fmt: skip
HARMLESS: dict[str, Any] = {
    "user": "x", "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x",
    "prompt_cache_key": "x", "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0,
    "repetition_penalty": 1.0, "stop": None, "response_format": None, "a_field_of_tomorrow": 1,
    "best_of": None, "suffix": None, "functions": [], "logit_bias": {}, "top_logprobs": 0,
}  # fmt: skip


@pytest.mark.parametrize("dialect", CHANGING, ids=lambda each: each.name)
def test_fields_that_would_change_the_answer_are_refused_by_name(dialect: Dialect) -> None:
    async def scene(ask: Asking) -> None:
        for name, value in CHANGING[dialect].items():
            fault = await ask.refused(dialect, {name: value})
            assert fault.status == dialect.refused
            assert f"`{name}" in fault.text, (name, fault)
            assert fault.param in (None, name)
        for name, value in HARMLESS.items():
            for stream in (False, True):
                assert await ask.post(*dialect.asked({name: value}, stream=stream)) is None, name

    play(scene)


# --- errors nobody expected -------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_our_own_has_the_dialects_envelope_too(
    dialect: Dialect, stream: bool, monkeypatch: Any
) -> None:
    async def scene() -> httpx.Response:
        async with adapter_world(template=TEMPLATE) as world:

            def fail(*_: Any, **__: Any) -> Any:
                raise RuntimeError("zzsecretzz")

            monkeypatch.setattr(world.parts.service, "generate_stream", fail)
            monkeypatch.setattr(world.parts.service, "generate", fail)
            path, body = dialect.asked({}, stream=stream)
            return await world.client.post(path, json=body)

    answer = asyncio.run(scene())
    assert answer.status_code == 500
    assert dialect.fault(answer).text == "Internal error"


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_a_stream_that_was_kept_alive_and_cannot_begin_says_so(
    dialect: Dialect, monkeypatch: Any
) -> None:
    """Its head is sent by then: what is wrong comes as the dialect's event for it."""

    async def scene() -> httpx.Response:
        async with adapter_world(template=TEMPLATE) as world:

            async def fail(*_: Any, **__: Any) -> Any:
                while not sse.TokenEvents.has_begun_somewhere:
                    await asyncio.sleep(0)
                raise GenerationError("row failed")

            monkeypatch.setattr(world.parts.service, "generate_stream", fail)
            path, body = dialect.asked({}, stream=True)
            return await world.client.post(path, json=body)

    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.0)
    monkeypatch.setattr(sse.TokenEvents, "has_begun_somewhere", False, raising=False)
    begin = sse.TokenEvents._begin

    async def noted(self: Any, send: Any) -> None:
        await begin(self, send)
        sse.TokenEvents.has_begun_somewhere = True

    monkeypatch.setattr(sse.TokenEvents, "_begin", noted)
    answer = asyncio.run(scene())
    assert answer.status_code == 200
    *before, last = events_of(answer)
    error = last["response"]["error"] if dialect is RESPONSES else last["error"]
    assert "row failed" in json.dumps(error)
    # Their SDK wants these two before any other event.
    kinds = [each["type"] for each in before]
    assert kinds == (["response.created", "response.in_progress"] if dialect is RESPONSES else [])
