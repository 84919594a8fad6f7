"""Completions as JSON: whole ones, and the parts of streamed ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from starlette.responses import Response

from lorax_contract.errors import LoraxError
from lorax_contract.step import FinishCode, TokenColumns
from lorax_router.http_api.json_text import EventOfText, Json, event
from lorax_router.http_api.openai.answers import (
    FINISH_REASONS,
    CompletionLogprobs,
    Heading,
    usage,
)
from lorax_router.http_api.openai.errors import envelope, openai_error_response
from lorax_router.service.batch import BatchStream
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.results import GenerateResult
from lorax_router.service.text import TextAssembler, TextStyle

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionShape:
    """How the answers of one request look."""

    style: TextStyle
    # The prompts come first: as sent, None where token ids were sent; none if not echoed.
    echoed: list[str | None] = field(default_factory=list)
    # Alternatives of each token; None: no logprobs.
    num_logprobs: int | None = None
    wants_usage: bool = False
    usage_with_each: bool = False

    def choice(self, number: int, num_of_prompt: int) -> CompletionChoice:
        """Return one answer that has not begun."""
        assembler = self.style.assembler()
        prompt = number // num_of_prompt
        echoes = bool(self.echoed)
        return CompletionChoice(
            number, assembler, self.num_logprobs, echoes, self.echoed[prompt] if echoes else None
        )


@dataclass(slots=True)
class CompletionChoice:
    """One answer while it comes."""

    index: int
    assembler: TextAssembler
    num_logprobs: int | None
    # Whether the prompt has to come first, and its text if it was sent as one.
    echoes: bool
    prompt_text: str | None
    columns: CompletionLogprobs = field(default_factory=CompletionLogprobs)

    def part(self, chunk: TokenChunk) -> Json:
        """Return what a chunk adds."""
        tokens, alternatives = chunk.tokens, chunk.alternatives
        text, starts = "", False
        if self.echoes and chunk.prompt_tokens is not None:
            self.echoes, starts = False, True
            prompt = chunk.prompt_tokens
            text = self.prompt_text if self.prompt_text is not None else "".join(prompt.texts)
            tokens = _joined(prompt, tokens)
            alternatives = chunk.prompt_alternatives + alternatives
        logprobs = None
        if self.num_logprobs is not None:
            logprobs = self.columns.document(tokens, alternatives, first_is_given=starts)
        is_last = chunk.finish is not FinishCode.RUNNING
        text += self.assembler.feed(chunk)
        return choice_document(
            self.index,
            text,
            logprobs=logprobs,
            finish_reason=FINISH_REASONS[chunk.finish] if is_last else None,
            stop_reason=self.assembler.stopped_by,
        )


def choice_document(
    index: int,
    text: str,
    *,
    logprobs: Json | None = None,
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
) -> Json:
    """Return a choice, or what a chunk adds to one."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def completion_document(
    heading: Heading, shape: CompletionShape, results: list[GenerateResult]
) -> Json:
    """Return the answer to a request that was not streamed."""
    num_each = len(results[0].sequences)
    sequences = [each for result in results for each in result.sequences]
    choices = [
        shape.choice(number, num_each).part(each.chunk) for number, each in enumerate(sequences)
    ]
    num_prompt = sum(result.num_prompt_tokens for result in results)
    num_cached = sum(result.num_cached_tokens for result in results)
    num_generated = sum(each.num_generated for each in sequences)
    return {**heading.document(choices), "usage": usage(num_prompt, num_cached, num_generated)}


class CompletionEvents:
    """The parts of streamed completions; an EventWriter."""

    def __init__(self, heading: Heading, shape: CompletionShape) -> None:
        self._heading = heading
        self._shape = shape
        self._choices: dict[int, CompletionChoice] = {}
        # Whether nothing but texts changes from chunk to chunk.
        self._is_plain = shape.num_logprobs is None and not shape.usage_with_each
        self._texts: dict[int, EventOfText] = {}

    def begin(self, stream: BatchStream) -> bytes:
        """Take the stream; nothing comes before the first token."""
        self._stream = stream
        self._num_of_prompt = stream.streams[0].request.num_sequences
        return b""

    def chunk(self, sequence: int, chunk: TokenChunk) -> bytes:
        """Return the event of a chunk; none where it shows nothing yet."""
        choice = self._choices.get(sequence)
        if choice is None:
            choice = self._shape.choice(sequence, self._num_of_prompt)
            self._choices[sequence] = choice
            self._texts[sequence] = EventOfText(partial(self._document_of, sequence))
        if self._is_plain and not choice.echoes and chunk.finish is FinishCode.RUNNING:
            text = choice.assembler.feed(chunk)
            return self._texts[sequence].of(text) if text else b""
        part = choice.part(chunk)
        if not part["text"] and part["logprobs"] is None and part["finish_reason"] is None:
            return b""
        document = self._heading.document([part])
        if self._shape.usage_with_each:
            document["usage"] = self._usage()
        return event(document)

    def _document_of(self, sequence: int, text: str) -> Json:
        """Return what a chunk says that only adds a text."""
        return self._heading.document([choice_document(sequence, text)])

    def end(self) -> bytes:
        """Return the usage if it is wanted, and the end."""
        if not self._shape.wants_usage:
            return DONE
        return event({**self._heading.document([]), "usage": self._usage()}) + DONE

    def failure(self, error: LoraxError) -> bytes:
        """Return an error as the last event."""
        return event(envelope(error))

    def refusal(self, error: LoraxError) -> Response:
        """Return the response of an error."""
        return openai_error_response(error)

    def _usage(self) -> Json:
        stream = self._stream
        return usage(stream.num_prompt_tokens, stream.num_cached, stream.num_generated)


def _joined(first: TokenColumns, then: TokenColumns) -> TokenColumns:
    return TokenColumns(
        first.ids + then.ids,
        first.logprobs + then.logprobs,
        first.texts + then.texts,
        first.special + then.special,
    )
