"""However a text is cut into pieces, it says the same: nothing is lost, doubled or raised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.chat_texts import COMMON, PARSERS, PIECES, fed, parser_of, turn_of
from tests.helpers.examples import examples

from lorax_router.service.chat.deltas import AssistantTurn, ReasoningDelta, ToolCallStart
from lorax_router.service.chat.output_parser import OutputParser
from lorax_router.service.chat.reasoning import ThinkParser

THINK_PIECES = ["<think>", "</think>", "<thi", "</", "\n", "\n\n", "hm", "<", " "]


def texts_of(pieces: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces + COMMON), max_size=12).map("".join)


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    places = draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=examples(100), deadline=None)
@given(data=st.data())
def test_calls_are_the_same_however_a_text_is_cut(name: str, data: st.DataObject) -> None:
    text = data.draw(texts_of(PIECES[name]))
    whole = turn_of(parser_of(name), [text])
    assert turn_of(parser_of(name), data.draw(cut(text))) == whole
    assert turn_of(parser_of(name), list(text)) == whole


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=examples(15), deadline=None)
@given(data=st.data())
def test_calls_are_the_same_wherever_a_text_is_cut_in_two(name: str, data: st.DataObject) -> None:
    text = data.draw(texts_of(PIECES[name]))
    whole = turn_of(parser_of(name), [text])
    for place in range(1, len(text)):
        assert turn_of(parser_of(name), [text[:place], text[place:]]) == whole


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=examples(50), deadline=None)
@given(data=st.data())
def test_a_text_without_a_call_is_all_content(name: str, data: st.DataObject) -> None:
    text = data.draw(texts_of(PIECES[name]))
    turn = turn_of(parser_of(name), data.draw(cut(text)))
    if not turn.tool_calls:
        assert turn.content == text
    # Content is what stands in the text, in its order.
    rest = iter(text)
    assert all(sign in rest for sign in turn.content)


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("name", [None, *PARSERS])
@settings(max_examples=examples(50), deadline=None)
@given(data=st.data())
def test_reasoning_is_the_same_however_a_text_is_cut(
    name: str | None, is_inside: bool, data: st.DataObject
) -> None:
    text = data.draw(texts_of(THINK_PIECES + (PIECES[name] if name else [])))

    def parser() -> OutputParser:
        return OutputParser(ThinkParser(is_inside=is_inside), parser_of(name) if name else None)

    whole = turn_of(parser(), [text])
    assert turn_of(parser(), data.draw(cut(text))) == whole
    assert turn_of(parser(), list(text)) == whole


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=examples(50), deadline=None)
@given(data=st.data())
def test_a_call_starts_before_its_arguments_and_once(name: str, data: st.DataObject) -> None:
    deltas = fed(parser_of(name), data.draw(cut(data.draw(texts_of(PIECES[name])))))
    starts = [delta for delta in deltas if isinstance(delta, ToolCallStart)]
    assert [start.index for start in starts] == list(range(len(starts)))
    assert [start.id for start in starts] == [f"id{number}" for number in range(len(starts))] or (
        name == "mistral"
    )
    # Raises where arguments come first.
    AssistantTurn().add(deltas)
    assert not any(isinstance(delta, ReasoningDelta) for delta in deltas)
