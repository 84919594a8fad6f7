"""The messages of streams, made of what the shards deliver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from lorax_contract.step import FinishCode
from lorax_proto import lorax_pb2 as pb
from lorax_router.grpc_api.responses import (
    FINISH_REASONS,
    AnswerStyle,
    StopCause,
    stopped_by,
    timings_of,
)
from lorax_router.service.chat.answers import ChatAnswer
from lorax_router.service.chat.deltas import (
    ChatDelta,
    ContentDelta,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallStart,
)
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.generation import AnswerStream


class ChunkMaker(ABC):
    """Makes the chunks of one stream.

    Args:
        request_id: sent with the first one.
    """

    # The class of the messages, and the name of its field for the sequence.
    message: Any
    place: str

    def __init__(self, stream: AnswerStream, style: AnswerStyle, request_id: str) -> None:
        self._stream = stream
        self._style = style
        self._request_id = request_id

    @abstractmethod
    def _said(self, sequence: int, chunk: TokenChunk) -> dict[str, Any]:
        """Return the fields of what a chunk says; empty: nothing yet."""

    @abstractmethod
    def _cause(self, sequence: int) -> StopCause:
        """Return what ended a sequence that has ended."""

    def chunk(self, sequence: int, chunk: TokenChunk) -> pb.GenerateChunk | pb.ChatChunk | None:
        """Return what a chunk says; None: nothing yet."""
        said = self._said(sequence, chunk)
        is_last = chunk.finish is not FinishCode.RUNNING
        if not (said or is_last or self._style.with_tokens):
            return None
        made = self.message(
            request_id=self._request_id,
            tokens=self._style.tokens(chunk.tokens, chunk.alternatives),
            finish_reason=FINISH_REASONS[chunk.finish],
            **{self.place: sequence},
            **said,
        )
        self._request_id = ""
        if is_last:
            self._complete(made, sequence)
        return made  # type: ignore[no-any-return]

    def _complete(self, made: pb.GenerateChunk | pb.ChatChunk, sequence: int) -> None:
        """Add what the last chunk of a sequence has, and the last of all."""
        if (cause := stopped_by(self._cause(sequence))) is not None:
            made.stopped_by.CopyFrom(cause)
        stream = self._stream
        if (seed := stream.seed_of(sequence)) is not None:
            made.seed = seed
        if stream.is_done:
            made.usage.prompt_tokens = stream.request.num_prompt_tokens
            made.usage.generated_tokens = stream.num_generated
            made.usage.cached_tokens = stream.num_cached
            made.timings.CopyFrom(timings_of(stream.timings, stream.adapter))


class TextChunks(ChunkMaker):
    """The chunks of GenerateStream."""

    message, place = pb.GenerateChunk, "sequence"

    def __init__(self, stream: AnswerStream, style: AnswerStyle, request_id: str) -> None:
        super().__init__(stream, style, request_id)
        num = stream.request.num_sequences
        self._assemblers = [style.text.assembler() for _ in range(num)]

    def _said(self, sequence: int, chunk: TokenChunk) -> dict[str, Any]:
        text = self._assemblers[sequence].feed(chunk)
        return {"text": text} if text else {}

    def _cause(self, sequence: int) -> StopCause:
        return self._assemblers[sequence].stopped_by


class ChatChunks(ChunkMaker):
    """The chunks of ChatStream."""

    message, place = pb.ChatChunk, "choice"

    def __init__(self, stream: AnswerStream, style: AnswerStyle, request_id: str) -> None:
        super().__init__(stream, style, request_id)
        request = stream.request
        self._answers = [
            ChatAnswer.new(style.text, request.new_parser) for _ in range(request.num_sequences)
        ]

    def _said(self, sequence: int, chunk: TokenChunk) -> dict[str, Any]:
        return _fields_of(self._answers[sequence].deltas(chunk))

    def _cause(self, sequence: int) -> StopCause:
        return self._answers[sequence].stopped_by


def _fields_of(deltas: Iterable[ChatDelta]) -> dict[str, Any]:
    """Return the fields of a ChatChunk that say what deltas say."""
    content, reasoning = "", ""
    calls: dict[int, pb.ToolCallDelta] = {}
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                content += text
            case ReasoningDelta(text):
                reasoning += text
            case ToolCallStart(index, call_id, name):
                calls[index] = pb.ToolCallDelta(index=index, id=call_id, name=name)
            case ToolArgumentsDelta(index, text):
                calls.setdefault(index, pb.ToolCallDelta(index=index)).arguments += text
    said = {"content": content, "reasoning_content": reasoning, "tool_calls": [*calls.values()]}
    return {name: value for name, value in said.items() if value}
