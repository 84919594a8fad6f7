"""`/v1/responses`: stateless answers, whole and streamed, and what bad input gets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session
from tests.helpers.scripted_engine import failure, words

from lorax_contract.errors import GenerationError
from lorax_contract.step import FinishCode
from lorax_router.service.chat.outputs import OutputParsers
from lorax_router.service.chat.reasoning import ThinkParser

PATH = "/v1/responses"
TOOLS = [{"type": "function", "name": "look", "parameters": {"type": "object"}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'


def pieces(text: str) -> list[str]:
    return [text[start : start + 3] for start in range(0, len(text), 3)]


async def asked(session: Session, **fields: Any) -> dict[str, Any]:
    answer = await session.post(PATH, **{"input": "w1", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def streamed(session: Session, **fields: Any) -> list[dict[str, Any]]:
    answer = await session.post(PATH, **{"input": "w1", "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    events = [each.split("\n") for each in answer.text.split("\n\n") if each]
    documents = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name for name, _ in events] == [f"event: {each['type']}" for each in documents]
    assert [each["sequence_number"] for each in documents] == [*range(len(documents))]
    return documents


def same(document: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs from answer to answer."""
    output = [{**item, "id": "", "call_id": ""} for item in document["output"]]
    return {**document, "id": "", "created_at": 0, "output": output}


@in_loop
async def test_a_response_has_what_sdks_read():
    session = Session()
    session.says("Hi", " you")
    document = await asked(session, instructions="w3")
    assert document["id"].startswith("resp_")
    assert (document["object"], document["status"]) == ("response", "completed")
    assert document["store"] is False
    (item,) = document["output"]
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Hi you", "annotations": [], "logprobs": []}],
    }
    used = document["usage"]
    assert used["output_tokens"] == 3
    assert used["total_tokens"] == used["input_tokens"] + 3


@pytest.mark.parametrize(
    ("texts", "finish", "fields", "status"),
    [
        (["Hi", " you"], FinishCode.EOS_TOKEN, {}, "completed"),
        (["Hi", " you"], FinishCode.LENGTH, {}, "incomplete"),
        (pieces("See. " + CALL + CALL), FinishCode.EOS_TOKEN, {"tools": TOOLS}, "completed"),
        (pieces(CALL[:50]), FinishCode.LENGTH, {"tools": TOOLS}, "incomplete"),
        (pieces("<think>\nHm.\n</think>\n\nHi!"), FinishCode.EOS_TOKEN, {}, "completed"),
        ([], FinishCode.EOS_TOKEN, {}, "completed"),
    ],
)
@in_loop
async def test_events_lead_to_the_whole_answer(texts, finish, fields, status):
    session = Session(World(outputs=OutputParsers(reasoning_parser=ThinkParser)))
    session.says(*texts, finish=finish)
    whole = await asked(session, **fields)
    assert whole["status"] == status
    events = await streamed(session, **fields)
    assert [each["type"] for each in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{status}"
    assert same(events[-1]["response"]) == same(whole)
    done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    for number, item in enumerate(done):
        said = "".join(
            each["delta"]
            for each in events
            if each["type"].endswith(".delta") and each["output_index"] == number
        )
        is_call = item["type"] == "function_call"
        assert said == (item["arguments"] if is_call else item["content"][0]["text"])


@in_loop
async def test_reasoning_is_an_item_and_its_tokens_are_counted():
    session = Session(World(outputs=OutputParsers(reasoning_parser=ThinkParser)))
    session.says("<think>", "Hm", ".", "</think>", "Hi", "!")
    document = await asked(session)
    assert [each["type"] for each in document["output"]] == ["reasoning", "message"]
    assert 2 <= document["usage"]["output_tokens_details"]["reasoning_tokens"] <= 4


@in_loop
async def test_items_become_messages():
    items = [
        {"role": "developer", "content": "w1"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "w2"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "w3", "annotations": []}]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "w4"},
    ]  # fmt: skip
    world = World(template="{{ messages | tojson }}")
    seen = []
    render = world.templates.render

    async def recorded(chat: Any, own: Any = None) -> str:
        seen.append(json.loads(await render(chat, own)))
        return "w1"

    world.templates.render = recorded
    await asked(Session(world), input=items, instructions="w0", tools=TOOLS)
    (given,) = seen
    roles = ["system", "system", "user", "assistant", "tool"]
    assert [each["role"] for each in given] == roles
    assert given[3]["tool_calls"][0]["function"]["name"] == "look"
    assert given[4]["content"] == "w4"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input.str"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input.0.role"),
    ({"input": [{"role": "user"}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{"type": "function_call", "name": "x"}]}, "input.0"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input.0.output"),
    ({"input": "w1 " * 25}, "input"),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 1000}, "input"),
    ({"temperature": -1}, "temperature"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_bad_input_is_a_400_that_names_it(fields, param, stream):
    session = Session()
    answer = await session.post(PATH, **{"input": "w1", **fields, "stream": stream})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert not session.world.engine.submitted


@in_loop
async def test_what_changes_nothing_is_taken():
    session = Session()
    session.says("Hi")
    await asked(
        session,
        store=False,
        background=False,
        truncation="disabled",
        include=["reasoning.encrypted_content"],
        previous_response_id=None,
        metadata={"a": "b"},
        text={"format": {"type": "text"}},
    )


@in_loop
async def test_an_answer_that_fails_is_a_500_and_in_a_stream_a_failed_response():
    session = Session()
    session.world.engine.script = lambda _: failure(GenerationError("no luck"))
    whole = await session.post(PATH, input="w1")
    assert whole.status_code == 500
    some = [next(words("Hi", "you"))]
    session.world.engine.script = lambda _: iter([*some, *failure(GenerationError("no luck"))])
    last = (await streamed(session))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert "no luck" in last["response"]["error"]["message"]
    (item,) = last["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Hi")
