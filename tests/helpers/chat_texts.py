"""Texts that models write who call tools, and pieces that such texts are made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from lorax_router.service.chat.deltas import AssistantTurn, ChatDelta
from lorax_router.service.chat.hermes import HermesParser
from lorax_router.service.chat.llama import LlamaJsonParser
from lorax_router.service.chat.mistral import MistralParser
from lorax_router.service.chat.output_parser import OutputParser
from lorax_router.service.chat.pythonic import PythonicParser
from lorax_router.service.chat.qwen_coder import QwenCoderParser
from lorax_router.service.chat.tool_parser import ToolCallParser
from lorax_router.service.chat.tools import FunctionTool

TOOLS = [
    FunctionTool(
        name="f",
        parameters={
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": "string"},
                "c": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["a"],
        },
    ),
    FunctionTool(name="get_weather"),
]

PARSERS: dict[str, type[ToolCallParser]] = {
    "hermes": HermesParser,
    "llama": LlamaJsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "qwen": QwenCoderParser,
}

# What random texts are put together of: the forms' own signs, whole and broken.
PIECES = {
    "hermes": [
        "<tool_call>", "</tool_call>", "<tool_", "call>", "</", '{"name": "f"', ', "arguments": ',
        '{"arguments": {"a": 1}, "name": "f"}', '{"name": "f", "arguments": {"a": "}\\""}}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": [1, {"b": "<tool_call>"}]}', "}",
        "[", "]", ",",
    ],
    "llama": [
        "<|python_tag|>", "<|python", '{"name": "f", "parameters": {"a": 1}}', ";", "; ",
        '{"type": "function", "name": "f", "parameters": {}}', '{"name": "x", "parameters": {}}',
        '{"name": "f"', ', "parameters": ', "{", "}", '{"a": 1}',
    ],
    "mistral": [
        "[TOOL_CALLS]", "[TOOL_", "[ARGS]", "[CALL_ID]", "abc123XYZ", "f", "[", "]", ", ",
        '{"name": "f", "arguments": {"a": 1}}', '{"a": "]"}', '{"arguments": {}, "name": "g-1"}',
    ],
    "pythonic": [
        "[", "]", "f(", "get_weather(", ")", ", ", "a=1", 'b="x, )"', "b='''it's'''", "c=[1, (2)]",
        "b={'x': None}", "b=''", "<|python_start|>", "<|python_end|>", "f(a=1)", "\\", "'", '"',
    ],
    "qwen": [
        "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>",
        "<parameter=b>", "</parameter>", "<function=", "<param", "\n", "12", "x < y", "[1]",
    ],
}  # fmt: skip
COMMON = [" ", "\n", "hello", "é🙂", "<", '"', "\\", "{", "\\u00e9", "null"]


def parser_of(name: str, tools: Sequence[FunctionTool] = TOOLS) -> ToolCallParser:
    """Return a parser whose ids are counted."""
    counter = itertools.count()
    return PARSERS[name](tools, lambda: f"id{next(counter)}")


def fed(parser: ToolCallParser | OutputParser, pieces: Iterable[str]) -> list[ChatDelta]:
    """Return all deltas of a text in pieces."""
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return [*deltas, *parser.finish()]


def turn_of(parser: ToolCallParser | OutputParser, pieces: Iterable[str]) -> AssistantTurn:
    """Return what a text in pieces says."""
    turn = AssistantTurn()
    turn.add(fed(parser, pieces))
    return turn


def said(name: str, text: str, tools: Sequence[FunctionTool] = TOOLS) -> tuple[str, list[Any]]:
    """Return content and calls of a whole text."""
    turn = turn_of(parser_of(name, tools), [text])
    return turn.content, [(call.name, call.arguments) for call in turn.tool_calls]
