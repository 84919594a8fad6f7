"""Requests and answers as they cross: what is typed by its fields, what clients leave open as JSON.

Moments are perf_counter seconds, as everywhere: on Linux all processes of a machine read the same
clock, so that those of the core mean the same in a front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from pydantic_core import from_json

from lorax_contract.pooling import HeadFacts
from lorax_router.http_api.json_text import dumps
from lorax_router.service.callers import Caller
from lorax_router.service.chat.output_parser import NewParser, OutputParser
from lorax_router.service.chat.outputs import AnswerReading
from lorax_router.service.chat.parser_book import ParserBook
from lorax_router.service.chat.tools import ToolChoice
from lorax_router.service.generation import AnswerStream
from lorax_router.service.origin import Origin
from lorax_router.service.prompts.encoding import Span
from lorax_router.service.requests import (
    ChatPrompt,
    GenerateParameters,
    GenerateRequest,
    Prompt,
    Resumption,
    TextPrompt,
    TokenPrompt,
)
from lorax_router.service.results import AdapterUse, GenerateResult, Timings
from lorax_router.service.results import Sequence as GeneratedSequence


class PackedChat(msgspec.Struct, frozen=True, array_like=True):
    """A ChatPrompt; what templates take is JSON of the client's, with numbers of any length."""

    # Messages, tools, documents, and what the template is given beside.
    open_values: bytes
    tool_choice: ToolChoice
    add_generation_prompt: bool
    continue_final_message: bool
    is_answer_read: bool


class PackedRequest(msgspec.Struct, frozen=True, array_like=True):
    """A GenerateRequest; it has one of the three prompts."""

    text: TextPrompt | None
    ids: list[int] | None
    chat: PackedChat | None
    sent_text: str
    parameters: GenerateParameters
    streams_prompt: bool
    caller: Caller
    origin: Origin
    resumption: Resumption | None


class PackedReading(msgspec.Struct, frozen=True, array_like=True):
    """Which parsers read an answer, by name; the chat is known where they are made."""

    tool_parser: str | None
    reasoning_parser: str | None
    is_inside: bool


class PackedResult(msgspec.Struct, frozen=True, array_like=True):
    """A GenerateResult."""

    sequences: list[GeneratedSequence]
    texts: list[str]
    details: bool
    num_prompt_chars: int
    reading: PackedReading | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_skipped_tokens: int
    timings: Timings
    adapter: AdapterUse | None
    head: HeadFacts | None = None
    spans: list[Span] | None = None


class PackedOpening(msgspec.Struct, frozen=True, array_like=True):
    """What is known of a stream once it is admitted."""

    num_sequences: int
    num_prompt_tokens: int
    details: bool
    return_full_text: bool
    reading: PackedReading | None
    seed: int | None
    adapter_content: str
    # Of each sequence.
    seeds: list[int | None] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedRequest:
    """What a front knows of a request that is answered; an AskedRequest."""

    num_sequences: int
    num_prompt_tokens: int
    details: bool
    new_parser: NewParser
    return_full_text: bool
    sent_text: str = field(repr=False)

    def full_text(self, generated_text: str) -> str:
        """Return the text that the client gets: with the prompt when it asked for it."""
        return self.sent_text + generated_text if self.return_full_text else generated_text


def pack_request(request: GenerateRequest) -> PackedRequest:
    """Return what crosses of a request."""
    prompt = request.prompt
    return PackedRequest(
        prompt if isinstance(prompt, TextPrompt) else None,
        [*prompt.ids] if isinstance(prompt, TokenPrompt) else None,
        _pack_chat(prompt) if isinstance(prompt, ChatPrompt) else None,
        request.sent_text,
        request.parameters,
        request.streams_prompt,
        request.caller,
        request.origin,
        request.resumption,
    )


def unpack_request(packed: PackedRequest) -> GenerateRequest:
    """Return the request that was packed."""
    return GenerateRequest(
        prompt=_prompt(packed),
        sent_text=packed.sent_text,
        parameters=packed.parameters,
        streams_prompt=packed.streams_prompt,
        caller=packed.caller,
        origin=packed.origin,
        resumption=packed.resumption,
    )


def pack_result(result: GenerateResult) -> PackedResult:
    """Return what crosses of an answer."""
    return PackedResult(
        [*result.sequences],
        [*result.texts],
        result.details,
        result.num_prompt_chars,
        _pack_reading(result.new_parser),
        result.num_prompt_tokens,
        result.num_cached_tokens,
        result.num_skipped_tokens,
        result.timings,
        result.adapter,
        result.head,
        result.spans,
    )


def unpack_result(
    packed: PackedResult, request: GenerateRequest, parsers: ParserBook
) -> GenerateResult:
    """Return the answer to a request that was packed."""
    return GenerateResult(
        sequences=tuple(packed.sequences),
        texts=tuple(packed.texts),
        details=packed.details,
        num_prompt_chars=packed.num_prompt_chars,
        new_parser=_reading(packed.reading, request, parsers),
        num_prompt_tokens=packed.num_prompt_tokens,
        num_cached_tokens=packed.num_cached_tokens,
        num_skipped_tokens=packed.num_skipped_tokens,
        timings=packed.timings,
        adapter=packed.adapter,
        head=packed.head,
        spans=packed.spans,
    )


def pack_opening(stream: AnswerStream) -> PackedOpening:
    """Return what crosses of a stream that was admitted."""
    request = stream.request
    return PackedOpening(
        request.num_sequences,
        request.num_prompt_tokens,
        request.details,
        request.return_full_text,
        _pack_reading(request.new_parser),
        stream.seed,
        stream.adapter_content,
        [stream.seed_of(each) for each in range(request.num_sequences)],
    )


def unpack_opening(
    packed: PackedOpening, request: GenerateRequest, parsers: ParserBook
) -> OpenedRequest:
    """Return what a front knows of a request whose stream was opened."""
    return OpenedRequest(
        num_sequences=packed.num_sequences,
        num_prompt_tokens=packed.num_prompt_tokens,
        details=packed.details,
        new_parser=_reading(packed.reading, request, parsers),
        return_full_text=packed.return_full_text,
        sent_text=request.sent_text,
    )


def _pack_chat(prompt: ChatPrompt) -> PackedChat:
    values = [prompt.messages, prompt.tools, prompt.documents, prompt.template_kwargs]
    return PackedChat(
        dumps(values),
        prompt.tool_choice,
        prompt.add_generation_prompt,
        prompt.continue_final_message,
        prompt.is_answer_read,
    )


def _prompt(packed: PackedRequest) -> Prompt:
    if packed.text is not None:
        return packed.text
    if packed.ids is not None:
        return TokenPrompt(packed.ids)
    assert packed.chat is not None
    chat, values = packed.chat, from_json(packed.chat.open_values)
    messages: Sequence[Mapping[str, Any]]
    messages, tools, documents, template_kwargs = values
    return ChatPrompt(
        messages=messages,
        tools=tools,
        tool_choice=chat.tool_choice,
        documents=documents,
        template_kwargs=template_kwargs,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        is_answer_read=chat.is_answer_read,
    )


def _pack_reading(new_parser: NewParser) -> PackedReading | None:
    """None: nothing is looked for in the answer."""
    if not isinstance(new_parser, AnswerReading):
        return None
    tools, reasoning = new_parser.tool_parser, new_parser.reasoning_parser
    return PackedReading(
        None if tools is None else tools.__name__,
        None if reasoning is None else reasoning.__name__,
        new_parser.is_inside,
    )


def _reading(
    packed: PackedReading | None, request: GenerateRequest, parsers: ParserBook
) -> NewParser:
    if packed is None:
        return OutputParser
    assert isinstance(request.prompt, ChatPrompt)
    return AnswerReading(
        prompt=request.prompt,
        tool_parser=parsers.tool_parser(packed.tool_parser),
        reasoning_parser=parsers.reasoning_parser(packed.reasoning_parser),
        is_inside=packed.is_inside,
    )
