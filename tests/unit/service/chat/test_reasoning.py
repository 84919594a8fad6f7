"""What a model thinks and what it says, apart."""

from __future__ import annotations

import pytest
from tests.helpers.chat_texts import parser_of, turn_of

from lorax_router.service.chat.output_parser import OutputParser, parse
from lorax_router.service.chat.reasoning import ThinkParser


@pytest.mark.parametrize(
    ("is_inside", "text", "reasoning", "content"),
    [
        (False, "<think>\nhm\n</think>\n\nYes.", "hm", "Yes."),
        (False, " \n<think>hm</think>Yes.\n", "hm", "Yes.\n"),
        (False, "<think>\n\n</think>\n\nYes.", "", "Yes."),
        (False, "Yes <think>hm</think>", "", "Yes <think>hm</think>"),
        (False, "<thin", "", "<thin"),
        (False, "", "", ""),
        (True, "hm\n\n1 < 2 </think>\nYes </think>.", "hm\n\n1 < 2 ", "Yes </think>."),
        # The prompt has the tag, and the model writes it again.
        (True, "\n<think>\nhm</think>Yes.", "hm", "Yes."),
        (True, "hm", "hm", ""),
        (True, "hm </thi", "hm </thi", ""),
        (True, "", "", ""),
        (True, "</think>Yes.", "", "Yes."),
    ],
)
def test_reasoning_is_split_off(is_inside: bool, text: str, reasoning: str, content: str) -> None:
    turn = parse(text, OutputParser(ThinkParser(is_inside=is_inside)))
    assert (turn.reasoning, turn.content, turn.tool_calls) == (reasoning, content, [])


def test_calls_are_looked_for_behind_the_reasoning() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    parser = OutputParser(ThinkParser(is_inside=True), parser_of("hermes"))
    turn = turn_of(parser, [f"I could {call}\n</think>\n\n{call}"])
    assert turn.reasoning == f"I could {call}"
    assert [(each.name, each.arguments) for each in turn.tool_calls] == [("f", '{"a": 1}')]
    assert turn.content == ""


def test_the_markers_of_both_are_needed() -> None:
    parser = OutputParser(ThinkParser(is_inside=True), parser_of("mistral"))
    assert parser.markers >= {"<think>", "</think>", "[TOOL_CALLS]", "[ARGS]"}
    assert OutputParser().markers == frozenset()


def test_without_parsers_all_is_content() -> None:
    assert parse("<think>x</think>", OutputParser()).content == "<think>x</think>"


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<think>", True),
        ("<think>\n\n</think>\n\n", False),
        ("tell me of <think> tags<|im_end|>\n<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_a_prompt_may_begin_the_reasoning(prompt: str, is_open: bool) -> None:
    assert ThinkParser.is_left_open(prompt) is is_open
