"""`/v1/messages`: what Anthropic's SDKs read, whole and streamed, and what bad input gets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.http_app import TEMPLATE, World
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session
from tests.helpers.scripted_engine import failure, words

from lorax_contract.errors import GenerationError, OverloadedError
from lorax_contract.step import FinishCode
from lorax_router.service.chat.outputs import OutputParsers
from lorax_router.service.chat.reasoning import ThinkParser

PATH = "/v1/messages"
COUNT = f"{PATH}/count_tokens"
TOOLS = [
    {"name": name, "description": f"to {name}", "input_schema": {"type": "object"}}
    for name in ("look", "walk")
]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
# Shows all that a template is given.
SHOWING = "{{ messages | tojson }}{{ tools | tojson }}{{ add_generation_prompt }}"


def pieces(text: str) -> list[str]:
    return [text[start : start + 3] for start in range(0, len(text), 3)]


def body(*said: Any, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [
        {"role": roles[number % 2], "content": content} for number, content in enumerate(said)
    ]
    return {"model": "tests/tiny", "max_tokens": 8, "messages": messages, **more}


async def asked(session: Session, *said: Any, **more: Any) -> dict[str, Any]:
    answer = await session.post(PATH, **body(*(said or ("w1",)), **more))
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"].startswith("req_")
    return answer.json()


async def streamed(session: Session, *said: Any, **more: Any) -> list[dict[str, Any]]:
    answer = await session.post(PATH, stream=True, **body(*(said or ("w1",)), **more))
    assert answer.status_code == 200, answer.text
    events = [each.split("\n") for each in answer.text.split("\n\n") if each]
    documents = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name for name, _ in events] == [f"event: {each['type']}" for each in documents]
    return documents


def message_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What an SDK makes of the events."""
    start, ping, *events, end = events
    assert (start["type"], ping["type"], end["type"]) == ("message_start", "ping", "message_stop")
    message, buffers = start["message"], {}
    for each in events:
        match each["type"]:
            case "content_block_start":
                assert each["index"] == len(message["content"])
                message["content"].append(each["content_block"])
                buffers[each["index"]] = ""
            case "content_block_delta":
                block, delta = message["content"][each["index"]], each["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "input_json_delta":
                        buffers[each["index"]] += delta["partial_json"]
            case "content_block_stop":
                if text := buffers.pop(each["index"]):
                    message["content"][each["index"]]["input"] = json.loads(text)
            case "message_delta":
                message.update(each["delta"])
                message["usage"].update(each["usage"])
    assert not buffers
    return message


def same(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what differs from answer to answer."""
    content = [{**block, "id": ""} for block in message["content"]]
    return {**message, "id": "", "content": content}


@in_loop
async def test_a_message_has_what_sdks_read():
    session = Session()
    session.says("Hi", " you")
    document = await asked(session, "w1 w2")
    assert document.pop("id").startswith("msg_")
    assert document == {
        "type": "message",
        "role": "assistant",
        "model": "tests/tiny",
        "content": [{"type": "text", "text": "Hi you"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": document["usage"]["input_tokens"],
            "output_tokens": 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        },
    }


@pytest.mark.parametrize(
    ("texts", "finish", "fields", "reason"),
    [
        (["Hi", " you"], FinishCode.EOS_TOKEN, {}, ("end_turn", None)),
        (["Hi", " you"], FinishCode.LENGTH, {}, ("max_tokens", None)),
        (["Hi EN", "D"], FinishCode.STOP_SEQUENCE, {"stop_sequences": ["END"]},
         ("stop_sequence", "END")),
        (pieces("See. " + CALL), FinishCode.EOS_TOKEN, {"tools": TOOLS}, ("tool_use", None)),
        (pieces(CALL), FinishCode.EOS_TOKEN, {"tools": TOOLS}, ("tool_use", None)),
        (pieces(CALL), FinishCode.EOS_TOKEN, {}, ("end_turn", None)),
        (["Hé", "\u2028", "\n"], FinishCode.LENGTH, {}, ("max_tokens", None)),
        ([], FinishCode.EOS_TOKEN, {}, ("end_turn", None)),
    ],
)  # fmt: skip
@in_loop
async def test_events_add_up_to_the_whole_answer(texts, finish, fields, reason):
    session = Session()
    session.says(*texts, finish=finish)
    whole = await asked(session, **fields)
    assert (whole["stop_reason"], whole["stop_sequence"]) == reason
    assert same(message_of(await streamed(session, **fields))) == same(whole)


@in_loop
async def test_marks_for_a_cache_change_nothing():
    """What is cached is found by itself."""
    mark = {"cache_control": {"type": "ephemeral"}}
    block, tool = {"type": "text", "text": "w1 w2"}, TOOLS[0]
    documents = []
    for more in ({}, mark):
        session = Session()
        session.says("Hi")
        documents.append(
            await asked(session, [block | more], system=[block | more], tools=[tool | more], **more)
        )
    assert same(documents[0]) == same(documents[1])


@in_loop
async def test_a_call_is_a_block_of_its_own():
    session = Session()
    session.says(*pieces("Let me see. " + CALL + "\n" + CALL))
    document = await asked(session, tools=TOOLS)
    text, first, second = document["content"]
    assert text["type"] == "text"
    assert text["text"].strip() == "Let me see."
    assert (first["type"], first["name"], first["input"]) == ("tool_use", "look", {"at": "it"})
    assert first["id"] != second["id"]
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    single = await asked(session, tools=TOOLS, tool_choice=choice)
    assert [each["type"] for each in single["content"]] == ["text", "tool_use"]


@in_loop
async def test_arguments_that_were_broken_off_are_there_as_far_as_they_came():
    session = Session()
    session.says(*pieces(CALL[: CALL.index("it") + 1]), finish=FinishCode.LENGTH)
    (call,) = (await asked(session, tools=TOOLS))["content"]
    assert call["type"] == "tool_use"
    assert set(call["input"]) <= {"at"}


@in_loop
async def test_what_the_model_thinks_is_a_block_of_its_own():
    session = Session(World(outputs=OutputParsers(reasoning_parser=ThinkParser)))
    session.says(*pieces("<think>\nHm.\n</think>\n\nHi!"))
    whole = await asked(session)
    assert whole["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Hi!"},
    ]
    assert same(message_of(await streamed(session))) == same(whole)


async def rendered(template: str = SHOWING, **fields: Any) -> str:
    """What a template makes of a body."""
    session = Session(World(template=template))
    seen: list[str] = []
    render = session.world.templates.render

    async def recorded(chat: Any, own: Any = None) -> str:
        seen.append(await render(chat, own))
        return "w1"

    session.world.templates.render = recorded
    answer = await session.post(COUNT, model="tests/tiny", **fields)
    assert answer.status_code == 200, answer.text
    return seen[-1]


@in_loop
async def test_templates_get_calls_and_their_results():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "w1"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {"type": "text", "text": "w2"},
            {"type": "tool_use", "id": "a", "name": "look", "input": {"at": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "is_error": True,
             "content": [{"type": "text", "text": "w3"}]},
            {"type": "text", "text": "w4"},
        ]},
        {"role": "user", "content": "w5"},
    ]  # fmt: skip
    text = await rendered(messages=messages, system=[{"type": "text", "text": "w0"}], tools=TOOLS)
    given, end = json.JSONDecoder().raw_decode(text)
    tools, _ = json.JSONDecoder().raw_decode(text, end)
    assert [each["role"] for each in given] == ["system", "user", "assistant", "tool", "user"]
    assert given[0]["content"] == "w0"
    assert given[2]["reasoning_content"] == "hm"
    assert given[2]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": 1}}
    assert (given[3]["tool_call_id"], given[3]["content"]) == ("a", "Error:\nw3")
    assert given[4]["content"] == "w4\nw5"
    assert tools[0]["function"]["parameters"] == {"type": "object"}
    assert text.endswith("True")


@in_loop
async def test_a_last_message_of_the_assistant_is_continued():
    text = await rendered(TEMPLATE, messages=body("w1", "w2 w3")["messages"])
    assert text == "<user> w1 <assistant> w2 w3"
    # An empty one has nothing to be continued.
    text = await rendered(TEMPLATE, messages=body("w1", "")["messages"])
    assert text == "<user> w1 <assistant>"


@in_loop
async def test_tokens_are_counted_and_nothing_is_generated():
    session = Session()
    session.says("Hi")
    said = body("w1 w2 w3")
    counted = (await session.post(COUNT, messages=said["messages"], model="tests/tiny")).json()
    assert not session.world.engine.submitted
    document = await asked(session, "w1 w2 w3")
    assert counted == {"input_tokens": document["usage"]["input_tokens"]}
    # A prompt that is too long to be computed can be counted.
    long = body("w1 " * 50)["messages"]
    assert (await session.post(COUNT, messages=long, model="tests/tiny")).json()[
        "input_tokens"
    ] > 50


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "`messages`"),
    ({"messages": "x"}, "`messages`"),
    ({"messages": [{"role": "user", "content": ""}]}, "`messages.0.content`"),
    ({"messages": [{"role": "user", "content": []}]}, "`messages.0.content`"),
    ({"messages": [{"role": "user"}]}, "`messages.0.content`"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "`messages.0.content`"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "`messages.0.role`"),
    ({"messages": [{"role": "user", "content": [5]}]}, "`messages.0.content.0`"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "text only"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "text only"),
    ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, "text only"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
     "`messages.0.content.0.text`"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "no"}]}]},
     "`messages.0.content.0.tool_use_id`"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "a", "name": "look", "input": {}}]}]}, "tool_result"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "a", "name": "look", "input": "x"}]}]}, "`messages.1.content.0"),
    ({"system": 5}, "`system"),
    ({"system": [{"type": "image"}]}, "`system.0`"),
    ({"max_tokens": 0}, "`max_tokens`"),
    ({"max_tokens": "5"}, "`max_tokens`"),
    ({"max_tokens": None}, "`max_tokens`"),
    ({"max_tokens": 1000}, "`max_tokens`"),
    ({"temperature": -1}, "`temperature`"),
    ({"stop_sequences": ["x"] * 9}, "`stop_sequences`"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
    ({"tools": [{"name": "a"}]}, "`tools.0.input_schema`"),
    ({"tools": [{"input_schema": {}}]}, "`tools.0.name`"),
    ({"tools": TOOLS * 2}, "`tools.2.name`"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "fly"}}, "`tool_choice`"),
    ({"tools": TOOLS, "tool_choice": {"type": "some"}}, "`tool_choice.type`"),
    ({"tool_choice": {"type": "any"}}, "`tool_choice.type`"),
    ({"tool_choice": "auto"}, "`tool_choice`"),
    ({"thinking": {"type": "perhaps"}}, "`thinking.type`"),
    ({"mcp_servers": [{"type": "url"}]}, "`mcp_servers`"),
    ({"output_config": {"format": {"type": "xml"}}}, "`output_config.format.type`"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "named"), BAD)
@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_bad_input_is_a_400_that_names_it(fields, named, stream):
    session = Session()
    answer = await session.post(PATH, **{**body("w1"), **fields, "stream": stream})
    assert answer.status_code == 400, answer.text
    document = answer.json()
    assert document["type"] == "error"
    assert document["error"]["type"] == "invalid_request_error"
    assert named in document["error"]["message"]
    assert document["request_id"] == answer.headers["request-id"]
    assert not session.world.engine.submitted


@in_loop
async def test_a_lone_surrogate_is_a_400():
    async with World().client() as client:
        raw = json.dumps(body("w\ud800"))
        answer = await client.post(PATH, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "surrogate" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_errors_have_the_types_of_the_dialect(stream):
    session = Session()
    unknown = await session.post(PATH, **{**body("w1"), "model": "no/such", "stream": stream})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    large = await session.post(PATH, **body("w1 " * 9000, stream=stream))
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    session.world.engine.refusal = OverloadedError()
    full = await session.post(PATH, **body("w1", stream=stream))
    assert (full.status_code, full.json()["error"]["type"]) == (529, "overloaded_error")
    assert full.headers["retry-after"] == "1"


@in_loop
async def test_an_answer_that_fails_is_an_api_error_and_in_a_stream_the_last_event():
    session = Session()
    session.world.engine.script = lambda _: failure(GenerationError("no luck"))
    whole = await session.post(PATH, **body("w1"))
    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "api_error")
    some = [next(words("Hi", "you"))]
    session.world.engine.script = lambda _: iter([*some, *failure(GenerationError("no luck"))])
    last = (await streamed(session))[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")


@in_loop
async def test_unknown_paths_and_methods_are_told_in_the_dialect():
    async with World().client() as client:
        for answer, status in (
            (await client.get(PATH), 405),
            (await client.post(f"{PATH}/batches", json={}), 404),
        ):
            assert answer.status_code == status
            assert answer.json()["type"] == "error"
