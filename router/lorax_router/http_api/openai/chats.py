"""Chat completions as JSON: whole ones, and the parts of streamed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from starlette.responses import Response

from lorax_contract.errors import LoraxError
from lorax_contract.step import FinishCode
from lorax_router.http_api.json_text import EventOfText, Json, event
from lorax_router.http_api.openai.answers import FINISH_REASONS, Heading, chat_logprobs, usage
from lorax_router.http_api.openai.completions import DONE
from lorax_router.http_api.openai.errors import CHAT_FIELDS, envelope, openai_error_response
from lorax_router.service.batch import BatchStream
from lorax_router.service.chat.answers import ChatAnswer
from lorax_router.service.chat.deltas import (
    AssistantTurn,
    ChatDelta,
    ContentDelta,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallStart,
)
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.results import GenerateResult
from lorax_router.service.text import TextStyle


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShape:
    """How the answers of one request look."""

    style: TextStyle
    # Alternatives of each token; None: no logprobs.
    num_logprobs: int | None = None
    wants_usage: bool = False
    usage_with_each: bool = False


def chat_document(heading: Heading, shape: ChatShape, result: GenerateResult) -> Json:
    """Return the answer to a request that was not streamed."""
    choices = []
    for index, sequence in enumerate(result.sequences):
        answer, turn = ChatAnswer.new(shape.style, result.new_parser), AssistantTurn()
        chunk = sequence.chunk
        turn.add(answer.deltas(chunk))
        choices.append(
            {
                "index": index,
                "message": _message(turn),
                "logprobs": _logprobs(shape, chunk),
                **_ending(answer, chunk),
            }
        )
    num_generated = sum(each.num_generated for each in result.sequences)
    used = usage(result.num_prompt_tokens, result.num_cached_tokens, num_generated)
    return {**heading.document(choices), "usage": used}


class ChatEvents:
    """The parts of a streamed chat completion; an EventWriter."""

    def __init__(
        self, heading: Heading, shape: ChatShape, names: Mapping[str, str] = CHAT_FIELDS
    ) -> None:
        self._names = names
        self._heading = heading
        self._shape = shape
        self._answers: dict[int, ChatAnswer] = {}
        # Whether nothing but what is said changes from chunk to chunk.
        self._is_plain = shape.num_logprobs is None and not shape.usage_with_each
        self._contents: dict[int, EventOfText] = {}

    def begin(self, stream: BatchStream) -> bytes:
        """Return for each answer the part that says who speaks."""
        self._stream = stream
        request = stream.streams[0].request
        parts = []
        for index in range(request.num_sequences):
            self._answers[index] = ChatAnswer.new(self._shape.style, request.new_parser)
            self._contents[index] = EventOfText(partial(self._content, index))
            parts.append(self._part(index, {"role": "assistant", "content": ""}))
        return b"".join(parts)

    def chunk(self, sequence: int, chunk: TokenChunk) -> bytes:
        """Return the parts of a chunk; none where it shows nothing yet."""
        answer = self._answers[sequence]
        said = answer.deltas(chunk)
        if self._is_plain and len(said) == 1 and chunk.finish is FinishCode.RUNNING:
            (only,) = said
            if isinstance(only, ContentDelta):
                return self._contents[sequence].of(only.text)
        deltas = [_delta(each) for each in said]
        logprobs = _logprobs(self._shape, chunk)
        is_last = chunk.finish is not FinishCode.RUNNING
        if not deltas and (is_last or logprobs is not None):
            deltas = [{}]
        # Logprobs are those of the chunk's tokens, and stand once.
        parts = [
            self._part(
                sequence,
                delta,
                logprobs if number == 0 else None,
                _ending(answer, chunk) if is_last and number == len(deltas) - 1 else {},
            )
            for number, delta in enumerate(deltas)
        ]
        return b"".join(parts)

    def end(self) -> bytes:
        """Return the usage if it is wanted, and the end."""
        if not self._shape.wants_usage:
            return DONE
        return event({**self._heading.document([]), "usage": self._usage()}) + DONE

    def failure(self, error: LoraxError) -> bytes:
        """Return an error as the last event."""
        return event(envelope(error, self._names))

    def refusal(self, error: LoraxError) -> Response:
        """Return the response of an error."""
        return openai_error_response(error, self._names)

    def _part(
        self, index: int, delta: Json, logprobs: Json | None = None, ending: Json | None = None
    ) -> bytes:
        document = self._document(index, delta, logprobs, ending)
        if self._shape.usage_with_each:
            document["usage"] = self._usage()
        return event(document)

    def _content(self, index: int, text: str) -> Json:
        return self._document(index, {"content": text})

    def _document(
        self, index: int, delta: Json, logprobs: Json | None = None, ending: Json | None = None
    ) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._heading.document([{**choice, **(ending or {})}])

    def _usage(self) -> Json:
        stream = self._stream
        return usage(stream.num_prompt_tokens, stream.num_cached, stream.num_generated)


def _logprobs(shape: ChatShape, chunk: TokenChunk) -> Json | None:
    """Return the logprobs of a chunk's tokens, if they are wanted."""
    if shape.num_logprobs is None:
        return None
    return {"content": chat_logprobs(chunk.tokens, chunk.alternatives, shape.num_logprobs)}


def _ending(answer: ChatAnswer, chunk: TokenChunk) -> Json:
    """Return why an answer ended; nulls while it has not."""
    reason = FINISH_REASONS.get(chunk.finish)
    if answer.calls_tools and reason == "stop":
        reason = "tool_calls"
    return {"finish_reason": reason, "stop_reason": answer.stopped_by}


def _message(turn: AssistantTurn) -> Json:
    message: Json = {"role": "assistant", "content": turn.content, "refusal": None}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["content"] = turn.content or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in turn.tool_calls
        ]
    return message


def _delta(delta: ChatDelta) -> Json:
    match delta:
        case ContentDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ToolCallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ToolArgumentsDelta(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
