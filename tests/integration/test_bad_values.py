"""Values that no dialect takes: refused by their name in the dialect, streamed as whole.

Whatever comes in, the router over a fake shard serves the next request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from tests.helpers.asking import Asking, asking, play
from tests.helpers.dialects import CHAT, COMPLETIONS, LORAX, MESSAGES, RESPONSES, TGI, Dialect

ENDLESS = {"$defs": {"x": {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}},
                           "required": ["a"]}}, "$ref": "#/$defs/x"}  # fmt: skip
# --- values that no route takes ---------------------------------------------------

PICTURES: tuple[dict[str, Any], ...] = (
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
    {"type": "input_image", "image_url": "https://a.example/b.png"},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "document", "source": {"type": "text", "data": "x"}},
    {"type": "input_file", "file_id": "x"},
    {"type": ["text"], "text": "x"},
    {"type": "P" * 5_000},
    {"text": "x"},
)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


CONVERSATIONS: dict[str, tuple[Any, str]] = {
    "none": ([], ""),
    "a number": (5, ""),
    "numbers": ([5], ""),
    "no role": ([{"content": "w1"}], "0"),
    "an unknown role": ([{"role": "wizard", "content": "w1"}], "0.role"),
    "a role of the wrong type": ([{"role": 5, "content": "w1"}], "0.role"),
    "a role of 100 kB": ([{"role": "r" * 100_000, "content": "w1"}], "0.role"),
    "no content": ([{"role": "user"}], "0"),
    "content that is null": (user(None), "0"),
    "content that is a number": (user(5), "0.content"),
    "parts that are numbers": (user([5]), "0.content.0"),
    "a text that is none": (user([{"type": "text", "text": 5}]), "0.content.0"),
    "a second one that is wrong": ([*user("w1"), {"role": "wizard", "content": "w1"}], "1.role"),
    **{f"a part {part.get('type')!s:.20}": (user([part]), "0.content.0") for part in PICTURES},
}


@pytest.mark.parametrize(
    ("dialect", "name"), [(CHAT, "messages"), (RESPONSES, "input"), (MESSAGES, "messages")],
    ids=lambda each: getattr(each, "name", each),
)  # fmt: skip
def test_conversations_that_are_none_are_refused_by_their_place(
    dialect: Dialect, name: str
) -> None:
    async def scene(ask: Asking) -> None:
        for title, (messages, place) in CONVERSATIONS.items():
            fault = await ask.refused(dialect, {name: messages})
            assert fault.status == dialect.refused, (title, fault)
            # What a union of types is at fault for is said by type.
            wanted = f"`{name}.{place}" if place else f"`{name}"
            assert wanted in fault.text, (title, fault)

    play(scene)


LONG = "n" * 100_000
SCHEMAS: dict[str, Any] = {
    "endless": ENDLESS, "no schema": {"type": 5}, "unknown words": {"type": "wizard"},
    "a pattern that is none": {"type": "string", "pattern": "("},
    "contradictory": {"allOf": [{"type": "string"}, {"type": "integer"}]},
}  # fmt: skip


def tools_in(dialect: Dialect, *functions: dict[str, Any]) -> list[Any]:
    """Definitions of tools as a dialect has them."""
    match dialect.name:
        case "chat":
            return [{"type": "function", "function": each} for each in functions]
        case "responses":
            return [{"type": "function", **each} for each in functions]
    return [
        {("input_schema" if key == "parameters" else key): value for key, value in each.items()}
        for each in functions
    ]


def forced(dialect: Dialect) -> Any:
    return {"type": "any"} if dialect is MESSAGES else "required"


def named(dialect: Dialect, name: str) -> Any:
    if dialect is MESSAGES:
        return {"type": "tool", "name": name}
    return {"type": "function", "function": {"name": name}}


def tool_faults(dialect: Dialect) -> Iterator[tuple[dict[str, Any], str]]:
    """Fields that are at fault, and the field that is named."""
    inside = "tools.0.function" if dialect is CHAT else "tools.0"
    second = inside.replace("0", "1")
    schema = "input_schema" if dialect is MESSAGES else "parameters"
    good = {"name": "f", "parameters": {"type": "object"}}

    def tools(*functions: dict[str, Any]) -> dict[str, Any]:
        return {"tools": tools_in(dialect, *functions)}

    for value in (5, "x", {}, [5], ["x"]):
        yield {"tools": value}, "tools"
    yield tools({**good, "name": ""}), f"{inside}.name"
    yield tools({**good, "name": 5}), f"{inside}.name"
    yield tools({"parameters": {}}), f"{inside}.name"
    yield tools(good, good), f"{second}.name"
    yield tools(*({**good, "name": LONG} for _ in range(2))), f"{second}.name"
    yield tools({**good, "parameters": "x"}), f"{inside}.{schema}"
    yield tools({**good, "parameters": [5]}), f"{inside}.{schema}"
    yield tools({**good, "strict": "yes"}), f"{inside}.strict"
    yield tools({**good, "description": 5}), f"{inside}.description"
    yield tools(*({**good, "name": f"f{n}"} for n in range(129))), "tools"
    yield {"tools": [{"type": "web_search", "name": "f"}]}, "tools.0"
    yield {"tools": [{"type": LONG, "name": "f"}]}, "tools.0"
    yield {"tool_choice": forced(dialect)}, "tool_choice"
    yield {**tools(good), "tool_choice": named(dialect, "g")}, "tool_choice"
    yield {**tools(good), "tool_choice": named(dialect, LONG)}, "tool_choice"
    for value in (5, "sometimes", ["auto"], {"type": "x"}, {"type": ["function"]}, {}):
        yield {**tools(good), "tool_choice": value}, "tool_choice"
    for wrong in SCHEMAS.values():
        function = {**good, "parameters": {"type": "object", "properties": {"a": wrong},
                                           "required": ["a"]}}  # fmt: skip
        yield {**tools(function), "tool_choice": forced(dialect)}, "tools"


@pytest.mark.parametrize("dialect", [CHAT, RESPONSES, MESSAGES], ids=lambda each: each.name)
def test_tools_that_are_none_are_refused_by_their_name_in_the_dialect(dialect: Dialect) -> None:
    async def scene(ask: Asking) -> None:
        for fields, name in tool_faults(dialect):
            fault = await ask.refused(dialect, fields)
            assert fault.status == dialect.refused, (str(fields)[:200], fault)
            assert f"`{name}" in fault.text, (str(fields)[:200], fault)
            assert dialect is CHAT or ".function" not in fault.text

    play(scene)


def parameters(**fields: Any) -> dict[str, Any]:
    return {"parameters": {"max_new_tokens": 2, **fields}}


def schema_of(wrong: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": wrong}, "required": ["a"]}


def in_format(wrong: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema_of(wrong)}}


HUGE = 2**62
VALUES: dict[Dialect, list[tuple[dict[str, Any], str]]] = {
    LORAX: [
        ({"inputs": ""}, "inputs"),
        ({"inputs": "w1 " * 400}, "inputs"),
        *((parameters(max_new_tokens=each), "max_new_tokens") for each in (0, -1, 400, HUGE)),
        (parameters(best_of=HUGE, do_sample=True), "best_of"),
        (parameters(top_k=0), "top_k"),
        (parameters(stop=["a", "b", "c", "d", "e"]), "stop"),
        (parameters(stop_token_ids=[HUGE]), "stop_token_ids"),
        *((parameters(response_format={"type": "json_object", "schema": schema_of(each)}),
           "response_format") for each in SCHEMAS.values()),
        (parameters(grammar={"type": "regex", "value": "("}), "grammar"),
        (parameters(schema='{"a": "\\ud800"}'), "schema"),
        (parameters(schema='{"a": NaN}'), "schema"),
        (parameters(schema="[" * 5_000), "schema"),
        (parameters(adapter_id="x\ny"), "adapter_id"),
        (parameters(merged_adapters={"ids": []}), "merged_adapters"),
    ],
    COMPLETIONS: [
        *(({"prompt": each}, "prompt") for each in (
            "", [], [""], [[]], ["w1", ""], ["w1", 5], [[1], "w1"], [HUGE], [-1], 5, None,
            "w1 " * 400, ["w1"] * 513)),
        *(({"max_tokens": each}, "max_tokens") for each in (0, -1, 400, HUGE)),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        *(({"n": each}, "n") for each in (0, -1, 129, HUGE)),
        ({"n": 100, "max_tokens": 400}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5_000: 1}}, "logit_bias"),
        ({"logit_bias": {str(HUGE): 1}}, "logit_bias"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"suffix": "x"}, "suffix"),
        *(({"response_format": in_format(each)}, "response_format") for each in SCHEMAS.values()),
        ({"guided_json": '{"a": "\\ud800"}'}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {LONG: 5}}, "structured_outputs"),
    ],
    CHAT: [
        *(({name: each}, name) for name in ("max_tokens", "max_completion_tokens")
          for each in (0, -1, 400, HUGE)),
        *(({"n": each}, "n") for each in (0, -1, 129, HUGE)),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": 5}, "stop"),
        *(({"response_format": in_format(each)}, "response_format") for each in SCHEMAS.values()),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
    RESPONSES: [
        ({"input": ""}, "input"),
        *(({"max_output_tokens": each}, "max_output_tokens") for each in (0, -1, 400, HUGE)),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"include": ["x"]}, "include"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        *(({"text": {"format": {"type": "json_schema", "name": "x", "schema": schema_of(each)}}},
           "text") for each in SCHEMAS.values()),
        ({"input": [{"type": "function_call_output", "call_id": 5}]}, "input.0.call_id"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input.0"),
        ({"input": [{"type": LONG}]}, "input.0.type"),
    ],
    MESSAGES: [
        *(({"max_tokens": each}, "max_tokens") for each in (0, -1, 400, HUGE)),
        ({"system": [{"type": "image"}]}, "system"),
        ({"system": 5}, "system"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        *(({"output_config": {"format": {"type": "json_schema", "schema": schema_of(each)}}},
           "output_config") for each in SCHEMAS.values()),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
         "messages.0.content.0.tool_use_id"),
        ({"messages": [*user("w1"), {"role": "assistant", "content": [
            {"type": "tool_use", "id": "x", "name": "f", "input": {}}]}]}, "messages"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
    ],
}  # fmt: skip
VALUES[TGI] = VALUES[LORAX]


@pytest.mark.parametrize("dialect", VALUES, ids=lambda each: each.name)
def test_values_out_of_bounds_are_refused_by_their_name_in_the_dialect(dialect: Dialect) -> None:
    async def scene(ask: Asking) -> None:
        for fields, name in VALUES[dialect]:
            fault = await ask.refused(dialect, fields)
            assert fault.status == dialect.refused, (str(fields)[:200], fault)
            assert f"`{name}" in fault.text or f".{name}`" in fault.text, (str(fields)[:200], fault)

    play(scene)


def test_nothing_is_generated_where_the_prompt_is_echoed_and_scored() -> None:
    async def scene(ask: Asking) -> None:
        body = {**COMPLETIONS.body, "max_tokens": 0, "echo": True, "logprobs": 1}
        assert await ask.post(COMPLETIONS.path, body) is None
        assert await ask.post(COMPLETIONS.path, {**body, "stream": True}) is None

    play(scene)


# --- what is JSON within a text ---------------------------------------------------


@pytest.mark.parametrize("dialect", [CHAT, RESPONSES], ids=lambda each: each.name)
def test_half_a_character_in_the_arguments_of_a_call_is_refused(dialect: Dialect) -> None:
    """They are a text, which the template is given as the JSON that is in it."""
    template = "{{ messages | tojson }}"
    arguments = '{"a": "\\ud800"}'
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    fields: dict[str, Any] = {
        "messages": [*user("w1"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    }
    if dialect is RESPONSES:
        item = {"type": "function_call", "call_id": "x", "name": "f", "arguments": arguments}
        fields = {"input": [*user("w1"), item]}

    async def scene() -> None:
        async with asking(template) as ask:
            fault = await ask.refused(dialect, fields)
            assert fault.status == dialect.refused
            assert "cannot be tokenized" in fault.text

    asyncio.run(scene())
