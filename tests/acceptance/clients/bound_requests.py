"""Requests whose outputs are bound to a JSON schema, in every dialect, and what their answers say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

PROMPT = "Write an example as JSON."


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One request, whatever its dialect."""

    schema: Json
    # "" is the base; an adapter otherwise, by its name among the local ones.
    adapter: str = ""
    temperature: float = 0.0
    seed: int = 1
    n: int = 1
    max_tokens: int = 700
    stop: tuple[str, ...] = ()
    stream: bool = False

    @property
    def model(self) -> str:
        return f"local:{self.adapter}" if self.adapter else "base"

    @property
    def messages(self) -> list[Json]:
        return [{"role": "user", "content": PROMPT}]


@dataclass(slots=True)
class Output:
    """A text, and why it ended in the words of its dialect."""

    text: str = ""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a request is written, and its answer read."""

    path: Callable[[Wanted], str]
    body: Callable[[Wanted], Json]
    # What an output that ended by itself gives as its reason.
    ended: str
    whole: Callable[[Json], list[Output]]
    streamed: Callable[[Iterable[Json]], list[Output]]
    # Whether one request can have several outputs.
    has_n: bool = False
    has_stop: bool = True


# OpenAI's chats and completions.


def _openai(wanted: Wanted, **binding: Any) -> Json:
    return {
        "model": wanted.model, "temperature": wanted.temperature, "seed": wanted.seed,
        "n": wanted.n, "max_tokens": wanted.max_tokens, "stream": wanted.stream, **binding,
        **({"stop": [*wanted.stop]} if wanted.stop else {}),
    }  # fmt: skip


def _chat_body(wanted: Wanted) -> Json:
    asked = {"type": "json_schema", "json_schema": {"name": "it", "schema": wanted.schema}}
    return _openai(wanted, messages=wanted.messages, response_format=asked)


def _structured_body(wanted: Wanted) -> Json:
    return _openai(wanted, messages=wanted.messages, structured_outputs={"json": wanted.schema})


def _guided_body(wanted: Wanted) -> Json:
    return _openai(wanted, prompt=PROMPT + "\n", guided_json=json.dumps(wanted.schema))


def _chats(document: Json) -> list[Output]:
    choices = sorted(document["choices"], key=lambda each: each["index"])
    return [Output(each["message"]["content"], each["finish_reason"]) for each in choices]


def _completions(document: Json) -> list[Output]:
    choices = sorted(document["choices"], key=lambda each: each["index"])
    return [Output(each["text"], each["finish_reason"]) for each in choices]


def _streamed_choices(text_of: Callable[[Json], str | None]) -> Any:
    def streamed(events: Iterable[Json]) -> list[Output]:
        found: dict[int, Output] = {}
        for choice in (choice for event in events for choice in event["choices"]):
            output = found.setdefault(choice["index"], Output())
            output.text += text_of(choice) or ""
            output.reason = choice["finish_reason"] or output.reason
        return [found[index] for index in sorted(found)]

    return streamed


# LoRAX's, with TGI's name for the same.


def _lorax_path(wanted: Wanted) -> str:
    return "/generate_stream" if wanted.stream else "/generate"


def _lorax(wanted: Wanted, **binding: Any) -> Json:
    parameters: Json = {
        "max_new_tokens": wanted.max_tokens, "apply_chat_template": True, "details": True,
        "stop": [*wanted.stop], **binding,
    }  # fmt: skip
    if wanted.temperature:
        parameters |= {"do_sample": True, "temperature": wanted.temperature, "seed": wanted.seed}
    if wanted.adapter:
        parameters |= {"adapter_id": wanted.adapter, "adapter_source": "local"}
    return {"inputs": PROMPT, "parameters": parameters}


def _generated(document: Json) -> list[Output]:
    return [Output(document["generated_text"], document["details"]["finish_reason"])]


def _streamed_tokens(events: Iterable[Json]) -> list[Output]:
    *_, last = events
    return _generated(last)


# OpenAI's Responses and Anthropic's messages.


def _responses_body(wanted: Wanted) -> Json:
    asked = {"type": "json_schema", "name": "it", "schema": wanted.schema}
    return {
        "model": wanted.model, "input": PROMPT, "store": False, "stream": wanted.stream,
        "temperature": wanted.temperature, "max_output_tokens": wanted.max_tokens,
        "text": {"format": asked},
    }  # fmt: skip


def _responses(document: Json) -> list[Output]:
    parts = [part for item in document["output"] for part in item["content"]]
    return [Output("".join(part["text"] for part in parts), document["status"])]


def _streamed_responses(events: Iterable[Json]) -> list[Output]:
    output = Output()
    for event in events:
        if event["type"] == "response.output_text.delta":
            output.text += event["delta"]
        elif event["type"] in ("response.completed", "response.incomplete"):
            output.reason = event["response"]["status"]
    return [output]


def _messages_body(wanted: Wanted) -> Json:
    return {
        "model": wanted.model, "messages": wanted.messages, "stream": wanted.stream,
        "temperature": min(wanted.temperature, 1.0), "max_tokens": wanted.max_tokens,
        "stop_sequences": [*wanted.stop],
        "output_config": {"format": {"type": "json_schema", "schema": wanted.schema}},
    }  # fmt: skip


def _messages(document: Json) -> list[Output]:
    text = "".join(part["text"] for part in document["content"])
    return [Output(text, document["stop_reason"])]


def _streamed_messages(events: Iterable[Json]) -> list[Output]:
    output = Output()
    for event in events:
        if event["type"] == "content_block_delta":
            output.text += event["delta"]["text"]
        elif event["type"] == "message_delta":
            output.reason = event["delta"]["stop_reason"]
    return [output]


def _at(path: str) -> Callable[[Wanted], str]:
    return lambda wanted: path


_CHATS = "/v1/chat/completions"
_streamed_chats = _streamed_choices(lambda choice: choice["delta"].get("content"))
_streamed_completions = _streamed_choices(lambda choice: choice["text"])

DIALECTS = {
    "response_format": Dialect(
        _at(_CHATS), _chat_body, "stop", _chats, _streamed_chats, has_n=True
    ),
    "structured_outputs": Dialect(
        _at(_CHATS), _structured_body, "stop", _chats, _streamed_chats, has_n=True
    ),
    "guided_json": Dialect(
        _at("/v1/completions"), _guided_body, "stop", _completions, _streamed_completions,
        has_n=True,
    ),
    "LoRAX's response_format": Dialect(
        _lorax_path,
        lambda wanted: _lorax(
            wanted, response_format={"type": "json_object", "schema": wanted.schema}
        ),
        "eos_token", _generated, _streamed_tokens,
    ),
    "LoRAX's schema": Dialect(
        _lorax_path, lambda wanted: _lorax(wanted, schema=json.dumps(wanted.schema)),
        "eos_token", _generated, _streamed_tokens,
    ),
    "TGI's grammar": Dialect(
        _lorax_path,
        lambda wanted: _lorax(wanted, grammar={"type": "json", "value": wanted.schema}),
        "eos_token", _generated, _streamed_tokens,
    ),
    "Responses": Dialect(
        _at("/v1/responses"), _responses_body, "completed", _responses, _streamed_responses,
        has_stop=False,
    ),
    "Anthropic's messages": Dialect(
        _at("/v1/messages"), _messages_body, "end_turn", _messages, _streamed_messages
    ),
}  # fmt: skip
