"""Anthropic's messages as JSON: whole ones, and the events of streamed ones."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json
from starlette.responses import Response

from lorax_contract.errors import LoraxError
from lorax_contract.step import FinishCode
from lorax_router.http_api.anthropic.errors import (
    anthropic_error_document,
    anthropic_error_response,
)
from lorax_router.http_api.blocks import Block, BlockReader, BlockStep
from lorax_router.http_api.json_text import Json, dumps
from lorax_router.http_api.responses import new_request_id
from lorax_router.service.batch import BatchStream
from lorax_router.service.chat.answers import ChatAnswer
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.results import GenerateResult
from lorax_router.service.text import TextStyle

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


@dataclass(frozen=True, slots=True)
class MessageHeading:
    """What an answer begins with."""

    model: str
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    request_id: str = field(default_factory=new_request_id)

    def document(self, content: list[Json], ending: Json, used: Json) -> Json:
        """Return an answer."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **ending,
            "usage": used,
        }


def message_document(heading: MessageHeading, style: TextStyle, result: GenerateResult) -> Json:
    """Return the answer to a request that was not streamed."""
    sequence, reader = result.sequences[0], BlockReader()
    answer = ChatAnswer.new(style, result.new_parser)
    for _ in reader.read(answer.deltas(sequence.chunk)):
        pass
    return heading.document(
        [_block(each) for each in reader.blocks],
        _ending(answer, sequence.finish),
        _usage(result.num_prompt_tokens, result.num_cached_tokens, sequence.num_generated),
    )


class MessageEvents:
    """The events of a streamed answer; an EventWriter."""

    def __init__(self, heading: MessageHeading, style: TextStyle) -> None:
        self._heading = heading
        self._style = style
        self._reader = BlockReader()

    def begin(self, stream: BatchStream) -> bytes:
        """Return the event of an answer that has no content yet."""
        self._stream = stream
        self._answer = ChatAnswer.new(self._style, stream.streams[0].request.new_parser)
        nothing: Json = {"stop_reason": None, "stop_sequence": None}
        used = _usage(stream.num_prompt_tokens, 0, 0)
        message = self._heading.document([], nothing, used)
        return named_event("message_start", message=message) + _PING

    def chunk(self, sequence: int, chunk: TokenChunk) -> bytes:
        """Return the events of a chunk; none where it shows nothing yet."""
        steps = self._reader.read(self._answer.deltas(chunk))
        events = b"".join(_step(each) for each in steps)
        if chunk.finish is FinishCode.RUNNING:
            return events
        return events + b"".join(_step(each) for each in self._reader.close()) + self._last(chunk)

    def end(self) -> bytes:
        """Return the last event."""
        return named_event("message_stop")

    def failure(self, error: LoraxError) -> bytes:
        """Return an error as the last event."""
        document = anthropic_error_document(error, self._heading.request_id)
        return b"event: error\ndata: " + dumps(document) + b"\n\n"

    def refusal(self, error: LoraxError) -> Response:
        """Return the response of an error."""
        return anthropic_error_response(error, self._heading.request_id)

    def _last(self, chunk: TokenChunk) -> bytes:
        used = _usage(
            self._stream.num_prompt_tokens, self._stream.num_cached, self._stream.num_generated
        )
        delta = _ending(self._answer, chunk.finish)
        return named_event("message_delta", delta=delta, usage=used)


def named_event(kind: str, **fields: Any) -> bytes:
    """Return one event, which has its type as its name too."""
    data = dumps({"type": kind, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _step(step: BlockStep) -> bytes:
    block = step.block
    match step.verb:
        case "begin":
            empty = _block(Block(block.index, block.kind, "", block.call_id, block.name))
            return named_event("content_block_start", index=block.index, content_block=empty)
        case "more":
            return named_event("content_block_delta", index=block.index, delta=_delta(step))
    return named_event("content_block_stop", index=block.index)


def _delta(step: BlockStep) -> Json:
    match step.block.kind:
        case "text":
            return {"type": "text_delta", "text": step.text}
        case "reasoning":
            return {"type": "thinking_delta", "thinking": step.text}
    return {"type": "input_json_delta", "partial_json": step.text}


def _block(block: Block) -> Json:
    match block.kind:
        case "text":
            return {"type": "text", "text": block.text}
        case "reasoning":
            # Nothing of ours is signed.
            return {"type": "thinking", "thinking": block.text, "signature": ""}
    arguments = _arguments(block.text)
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": arguments}


def _arguments(text: str) -> Any:
    """Return the arguments as far as they are there: as SDKs put them together of a stream."""
    try:
        found = from_json(text, allow_partial=True) if text.strip() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _ending(answer: ChatAnswer, finish: FinishCode) -> Json:
    stopped_by = answer.stopped_by
    if finish is FinishCode.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(stopped_by, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
    reason = "tool_use" if answer.calls_tools else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(num_prompt: int, num_cached: int, num_generated: int) -> Json:
    return {
        # Those of the prompt that were not in the cache.
        "input_tokens": num_prompt - num_cached,
        "output_tokens": num_generated,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
    }
