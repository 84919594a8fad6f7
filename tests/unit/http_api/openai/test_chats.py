"""`/v1/chat/completions`: messages, tools, streams that add up to the whole answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session

from lorax_contract.constraint import Constraint
from lorax_contract.step import FinishCode
from lorax_router.http_api.openai.tool_choice import offered_tools

PATH = "/v1/chat/completions"
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "walk")
]
STRICT = {"type": "function", "function": {"name": "run", "strict": True}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'


def pieces(text: str) -> list[str]:
    return [text[start : start + 3] for start in range(0, len(text), 3)]


def joined(parts: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """What a client makes of a stream."""
    message: dict[str, Any] = {"content": "", "calls": {}, "reason": None}
    for part in parts:
        for choice in part["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", []):
                entry = message["calls"].setdefault(call["index"], ["", ""])
                entry[0] += call["function"].get("name", "")
                entry[1] += call["function"]["arguments"]
            message["reason"] = choice["finish_reason"] or message["reason"]
    return message


@in_loop
async def test_a_chat_completion_has_what_sdks_read():
    session = Session()
    session.says("Hi", " you")
    document = await session.chat("w1")
    assert document["id"].startswith("chatcmpl-")
    assert document["object"] == "chat.completion"
    assert document["model"] == "tests/tiny"
    assert document["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi you", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert document["usage"]["completion_tokens"] == 3


@in_loop
async def test_a_stream_begins_with_the_role_and_adds_up():
    session = Session()
    session.says("Hi", " you", "!")
    parts = await session.stream(PATH, **session.chat_body("w1", n=2))
    assert {each["object"] for each in parts} == {"chat.completion.chunk"}
    assert [each["choices"][0]["delta"] for each in parts[:2]] == [
        {"role": "assistant", "content": ""}
    ] * 2
    for index in range(2):
        assert joined(parts, index) == {"content": "Hi you!", "calls": {}, "reason": "stop"}


@in_loop
async def test_logprobs_come_with_their_tokens():
    session = Session()
    session.says("Hé", "!", finish=FinishCode.LENGTH)
    document = await session.chat(logprobs=True, top_logprobs=1)
    (choice,) = document["choices"]
    first, second = choice["logprobs"]["content"]
    same = {"token": "Hé", "logprob": -0.25, "bytes": [72, 195, 169]}
    assert first == {**same, "top_logprobs": [same]}
    assert choice["finish_reason"] == "length"
    parts = await session.stream(PATH, **session.chat_body(logprobs=True))
    streamed = [p["choices"][0]["logprobs"] for p in parts if p["choices"][0]["logprobs"]]
    tokens = [token["token"] for each in streamed for token in each["content"]]
    assert tokens == ["Hé", "!"]
    assert all(t["top_logprobs"] == [] for each in streamed for t in each["content"])
    assert second["token"] == "!"


@in_loop
async def test_a_call_of_a_tool_is_no_content():
    session = Session()
    session.says(*pieces("Let me see. " + CALL))
    body = session.chat_body("w1", tools=TOOLS)
    document = (await session.post(PATH, **body)).json()
    (choice,) = document["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"]
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"]) == {"at": "it"}
    parts = await session.stream(PATH, **body)
    streamed = joined(parts)
    assert streamed["reason"] == "tool_calls"
    assert streamed["calls"] == {0: ["look", call["function"]["arguments"]]}
    assert streamed["content"] == (choice["message"]["content"] or "")


@in_loop
async def test_without_tools_the_same_text_is_content():
    session = Session()
    session.says(*pieces(CALL))
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        document = await session.chat("w1", **more)
        assert document["choices"][0]["message"]["content"] == CALL
        assert document["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", [{"function": {"name": "look"}}, "look"])
def test_a_tool_is_named_as_clients_of_tgi_name_it(choice):
    of_openai = {"type": "function", "function": {"name": "look"}}
    assert offered_tools(TOOLS, choice) == offered_tools(TOOLS, of_openai)


@in_loop
async def test_streams_and_refusals_name_themselves_as_whole_answers_do():
    session = Session()
    session.says("Hi")
    bodies = ({}, {"stream": True}, {"n": 0}, {"n": 0, "stream": True}, {"model": "nobody"})
    answers = [await session.post(PATH, **session.chat_body("w1", **each)) for each in bodies]
    assert [each.status_code for each in answers] == [200, 200, 400, 400, 404]
    assert len({each.headers["x-request-id"] for each in answers}) == len(answers)


class NotedConstraints:
    """Makes nothing ready; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Constraint] = []

    async def ready(self, constraint: Constraint, content: object = None) -> Constraint:
        self.asked.append(constraint)
        return constraint


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "binds"),
    [
        ({"tools": TOOLS}, "response_format"),
        ({"tools": [*TOOLS, STRICT]}, "response_format"),
        ({"tools": TOOLS, "tool_choice": "none"}, "response_format"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}}, "tools"),
    ],
)  # fmt: skip
def test_a_format_binds_the_text_of_an_answer_and_no_call(fields, binds, stream):
    @in_loop
    async def scene():
        noted = NotedConstraints()
        session = Session(World(constraints=noted))
        body = session.chat_body("w1", response_format={"type": "json_object"}, stream=stream)
        answer = await session.post(PATH, **body, **fields)
        assert answer.status_code == 200, answer.text
        (constraint,) = noted.asked
        assert constraint.field_name == binds
        is_either = binds == "response_format" and fields.get("tool_choice") != "none"
        assert ("calls | content" in constraint.frame) == is_either

    scene()


@in_loop
async def test_an_answer_tells_what_made_it():
    session = Session()
    session.says("Hi")
    document = await session.chat()
    assert document["system_fingerprint"].startswith("lorax-py-")
    parts = await session.stream(PATH, **session.chat_body())
    assert {each["system_fingerprint"] for each in parts} == {document["system_fingerprint"]}
    completion = await session.complete()
    assert completion["system_fingerprint"] == document["system_fingerprint"]


@in_loop
async def test_calls_after_the_first_are_left_out_on_request():
    session = Session()
    session.says(*pieces(CALL + "\n" + CALL))
    many = await session.chat("w1", tools=TOOLS)
    assert len(many["choices"][0]["message"]["tool_calls"]) == 2
    one = await session.chat("w1", tools=TOOLS, parallel_tool_calls=False)
    assert len(one["choices"][0]["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
         "messages.0.tool_calls"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}, "tools": TOOLS},
         "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools.1.function"),
        ({"continue_final_message": True, "add_generation_prompt": True},
         "continue_final_message"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_refused_by_name(fields, param, stream):
    @in_loop
    async def scene():
        session = Session()
        answer = await session.post(PATH, **session.chat_body("w1", **fields), stream=stream)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"].startswith(param), error
        assert session.world.engine.submitted == []

    scene()


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_that_is_too_long_is_refused_by_the_name_of_its_field(stream):
    @in_loop
    async def scene():
        body = Session.chat_body("w1 " * 25, stream=stream)
        answer = await Session().post(PATH, **body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages"

    scene()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "w1"},
        {"role": "developer", "content": "w1"},
        {"role": "user", "content": [{"type": "text", "text": "w1"}]},
        {"role": "user", "content": "w1", "name": "me"},
        {"role": "tool", "content": "w1", "tool_call_id": "call_1"},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "call_1", "type": "function",
                         "function": {"name": "look", "arguments": "{}"}}]},
    ],
)  # fmt: skip
def test_messages_of_all_roles_are_taken(message):
    @in_loop
    async def scene():
        session = Session()
        document = await session.chat(messages=[message, {"role": "user", "content": "w2"}])
        assert document["choices"]

    scene()
