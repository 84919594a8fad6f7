"""Chat and ChatStream: calls of tools, reasoning, and what binds an answer to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from tests.helpers.constraints import AnyConstraints
from tests.helpers.grpc_calls import Served, grpc_served, refused
from tests.helpers.http_app import World, limits
from tests.helpers.in_loop import in_loop
from tests.helpers.scripted_engine import ScriptedEngine, words

from lorax_contract.step import FinishCode
from lorax_proto import lorax_pb2 as pb
from lorax_router.service.chat.outputs import OutputParsers
from lorax_router.service.chat.reasoning import ThinkParser

THOUGHT = ["<think>", "hm", "</think>"]
CALLS = [
    "Well:", " <tool_call>", '{"name": "f", "arg', 'uments": {"a"', ": 1}}", "</tool_call>",
    "<tool_call>", '{"name": "g", "arguments": {}}', "</tool_call>", "<|end|>",
]  # fmt: skip
TOOL = pb.Tool(name="f", parameters_schema='{"type": "object", "properties": {}}')


def world_that_says(texts: Sequence[str], **more: Any) -> World:
    engine = ScriptedEngine(lambda _: words(*texts, finish=FinishCode.EOS_TOKEN))
    outputs = OutputParsers(reasoning_parser=ThinkParser)
    bounds = limits(max_total_tokens=40)
    return World(
        engine=engine, outputs=outputs, bounds=bounds, constraints=AnyConstraints(), **more
    )


def chat(*tools: pb.Tool, **more: Any) -> pb.ChatRequest:
    messages = [pb.ChatMessage(role="user", content="w1")]
    return pb.ChatRequest(messages=messages, tools=tools, **more)


async def streamed(served: Served, sent: pb.ChatRequest) -> tuple[list[pb.ChatChunk], Any]:
    """Return the chunks of a stream, and the choice that they make, put together."""
    chunks = [each async for each in served.stub.ChatStream(sent, timeout=30)]
    message = pb.ChatMessage(role="assistant")
    for chunk in chunks:
        message.content += chunk.content
        message.reasoning_content += chunk.reasoning_content
        for delta in chunk.tool_calls:
            if delta.id:
                assert delta.index == len(message.tool_calls)
                message.tool_calls.add(id=delta.id, name=delta.name)
            message.tool_calls[delta.index].arguments += delta.arguments
    return chunks, message


def without_ids(message: pb.ChatMessage) -> pb.ChatMessage:
    assert all(call.id for call in message.tool_calls)
    return pb.ChatMessage(
        content=message.content,
        reasoning_content=message.reasoning_content,
        tool_calls=[pb.ToolCall(name=c.name, arguments=c.arguments) for c in message.tool_calls],
    )


@in_loop
async def test_calls_and_reasoning_are_told_apart_whole_and_streamed():
    async with grpc_served(world_that_says([*THOUGHT, *CALLS])) as served:
        whole = (await served.stub.Chat(chat(TOOL), timeout=30)).choices[0]
        message = whole.message
        assert (message.role, message.content) == ("assistant", "Well: ")
        assert message.reasoning_content == "hm"
        calls = [(call.name, call.arguments) for call in message.tool_calls]
        assert calls == [("f", '{"a": 1}'), ("g", "{}")]
        assert whole.finish_reason == pb.FINISH_REASON_EOS_TOKEN
        chunks, put_together = await streamed(served, chat(TOOL))
        assert without_ids(put_together) == without_ids(message)
        assert chunks[-1].finish_reason == whole.finish_reason
        # As they form.
        parts = [delta for chunk in chunks for delta in chunk.tool_calls if delta.index == 0]
        assert [(each.name, each.arguments) for each in parts] == [("f", '{"a"'), ("", ": 1}")]


@in_loop
async def test_what_is_no_call_of_an_offered_tool_is_content():
    async with grpc_served(world_that_says(CALLS)) as served:
        for sent in (chat(), chat(TOOL, tool_choice=pb.ToolChoice(mode="MODE_NONE"))):
            message = (await served.stub.Chat(sent, timeout=30)).choices[0].message
            assert not message.tool_calls
            assert message.content == "".join(CALLS[:-1])


@in_loop
async def test_at_most_one_call_where_one_is_wanted():
    async with grpc_served(world_that_says(CALLS)) as served:
        sent = chat(TOOL, tool_choice=pb.ToolChoice(single=True))
        message = (await served.stub.Chat(sent, timeout=30)).choices[0].message
        assert [call.name for call in message.tool_calls] == ["f"]
        _, put_together = await streamed(served, sent)
        assert without_ids(put_together) == without_ids(message)


@pytest.mark.parametrize(
    ("choice", "is_bound"),
    [
        (pb.ToolChoice(), False),
        (pb.ToolChoice(mode="MODE_AUTO"), False),
        (pb.ToolChoice(mode="MODE_NONE"), False),
        (pb.ToolChoice(mode="MODE_REQUIRED"), True),
        (pb.ToolChoice(name="f"), True),
    ],
)
@in_loop
async def test_a_forced_call_binds_the_answer(choice: pb.ToolChoice, is_bound: bool):
    world = world_that_says(CALLS)
    async with grpc_served(world) as served:
        await served.stub.Chat(chat(TOOL, tool_choice=choice), timeout=30)
        await served.stub.Chat(chat(pb.Tool(name="f", strict=True)), timeout=30)
        forced, strict = (each.constraint for each in world.engine.submitted)
        assert (forced is not None) == is_bound
        assert strict is not None


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (chat(TOOL, TOOL), "tools.1.name"),
        (pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="w1 " * 30)]), "messages"),
        (pb.ChatRequest(), "messages"),
        (chat(pb.Tool(description="?")), "tools.0.name"),
        (chat(pb.Tool(name="f", parameters_schema="[]")), "tools.0.parameters_schema"),
        (chat(TOOL, tool_choice=pb.ToolChoice(name="x")), "tool_choice"),
        (chat(tool_choice=pb.ToolChoice(mode="MODE_REQUIRED")), "tool_choice"),
        (chat(TOOL, tool_choice=pb.ToolChoice(mode=9)), "tool_choice.mode"),
    ],
)
@in_loop
async def test_what_cannot_be_answered_is_refused_by_its_name(sent: pb.ChatRequest, field: str):
    async with grpc_served(world_that_says(CALLS)) as served:
        for call in (served.stub.Chat, served.stub.ChatStream):
            refusal = await refused(call(sent, timeout=30))
            assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT.name
            assert refusal.field == field


@in_loop
async def test_what_was_thought_before_reaches_the_template():
    template = "{% for m in messages %}{{ m.reasoning_content or m.content }} {% endfor %}"
    world = world_that_says(["w9"], template=template)
    async with grpc_served(world) as served:
        sent = chat()
        sent.messages.add(role="assistant", content="w2", reasoning_content="w3")
        sent.messages.add(role="user", content="w4")
        await served.stub.Chat(sent, timeout=30)
        assert list(world.engine.submitted[0].prompt_ids) == [1, 3, 4]
