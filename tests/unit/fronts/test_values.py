"""Requests and answers are the same in the process that they cross to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.any_values import any_of

from lorax_contract.step import TokenColumns
from lorax_router.fronts.values import (
    PackedOpening,
    PackedRequest,
    PackedResult,
    pack_opening,
    pack_request,
    pack_result,
    unpack_opening,
    unpack_request,
    unpack_result,
)
from lorax_router.service.chat.output_parser import OutputParser
from lorax_router.service.chat.outputs import AnswerReading, OutputParsers
from lorax_router.service.chat.parser_book import ParserBook
from lorax_router.service.chat.reasoning import ThinkParser
from lorax_router.service.requests import ChatPrompt, GenerateRequest, TextPrompt
from lorax_router.service.results import GenerateResult, Sequence, Timings

BOOK = ParserBook()
CHAT = ChatPrompt(
    messages=[{"role": "user", "content": "w1"}],
    tools=[{"type": "function", "function": {"name": "look"}}],
)


def crossed(packed: Any, kind: type) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(packed), type=kind)


@given(any_of(GenerateRequest))
@settings(max_examples=200, deadline=None)
def test_a_request_crosses_unchanged(request: GenerateRequest) -> None:
    found = unpack_request(crossed(pack_request(request), PackedRequest))
    assert found == request
    assert type(found.prompt) is type(request.prompt)


def test_a_secret_is_in_no_repr_on_the_way() -> None:
    request = GenerateRequest(prompt=TextPrompt("a-secret-text"))
    assert "a-secret-text" not in repr(pack_request(request).text)


@given(any_of(GenerateResult, new_parser=st.just(OutputParser)))
@settings(max_examples=100, deadline=None)
def test_an_answer_crosses_unchanged(result: GenerateResult) -> None:
    found = unpack_result(
        crossed(pack_result(result), PackedResult), GenerateRequest(prompt=CHAT), BOOK
    )
    assert found == result


def result_of(**fields: Any) -> GenerateResult:
    values: dict[str, Any] = {
        "sequences": (Sequence(None),),
        "texts": ("",),
        "details": False,
        "num_prompt_chars": 0,
        "new_parser": OutputParser,
        "num_prompt_tokens": 1,
        "timings": Timings(1.0),
    }
    return GenerateResult(**{**values, **fields})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_logprob_that_is_no_number_stays_what_it_is(value: float) -> None:
    sequence = Sequence(None, prompt_tokens=TokenColumns([1], [value], ["a"], [False]))
    packed = crossed(pack_result(result_of(sequences=(sequence,))), PackedResult)
    (found,) = packed.sequences
    assert repr(found.prompt_tokens.logprobs) == repr([value])


@pytest.mark.parametrize("prompt_text", ["", "<think>\n"])
@pytest.mark.parametrize("reasoning", [None, ThinkParser])
@pytest.mark.parametrize("tools", [None, *BOOK.tool_parsers], ids=str)
def test_the_parsers_of_an_answer_are_the_same_there(tools, reasoning, prompt_text) -> None:
    reading = OutputParsers(tools, reasoning).reading(CHAT, prompt_text)
    packed = crossed(pack_result(result_of(new_parser=reading)), PackedResult)
    found = unpack_result(packed, GenerateRequest(prompt=CHAT), BOOK)
    assert found.new_parser == reading
    assert isinstance(found.new_parser, AnswerReading)
    assert isinstance(found.new_parser(), OutputParser)


@given(st.integers(1, 128), st.integers(0, 2**40), st.booleans(), st.booleans(), st.text())
@settings(deadline=None)
def test_a_stream_begins_there_as_it_did_here(number, num_prompt, details, is_full, sent) -> None:
    @dataclasses.dataclass
    class Stream:
        request: Any
        seed: int | None
        adapter_content: str

        def seed_of(self, sequence: int) -> int | None:
            return self.seed and self.seed - sequence

    request = GenerateRequest(prompt=CHAT, sent_text=sent)
    seeds = [2**64 - 1 - each for each in range(number)]
    packed = PackedOpening(number, num_prompt, details, is_full, None, 2**64 - 1, "a digest", seeds)
    there = unpack_opening(packed, request, BOOK)
    stream: Any = Stream(there, packed.seed, packed.adapter_content)
    again = crossed(pack_opening(stream), PackedOpening)
    assert again == packed
    assert there.full_text("x") == (sent + "x" if is_full else "x")
