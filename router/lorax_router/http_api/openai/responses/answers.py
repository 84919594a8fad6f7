"""Responses as JSON: whole ones, and the events of streamed ones."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from starlette.responses import Response

from lorax_contract.errors import LoraxError
from lorax_contract.step import FinishCode
from lorax_router.http_api.blocks import Block, BlockReader, BlockStep, token_by_token
from lorax_router.http_api.json_text import Json, dumps
from lorax_router.http_api.openai.errors import envelope, openai_error_response
from lorax_router.http_api.openai.responses.bodies import ResponsesBody
from lorax_router.service.batch import BatchStream
from lorax_router.service.chat.answers import ChatAnswer
from lorax_router.service.chat.output_parser import NewParser, OutputParser
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.results import GenerateResult
from lorax_router.service.text import TextStyle

# Names of fields in errors, where they differ from those of completions.
NAMES = {"inputs": "input", "max_new_tokens": "max_output_tokens", "adapter_id": "model"}
_KINDS = {"text": "message", "reasoning": "reasoning", "call": "function_call"}
_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}


@dataclass(frozen=True, slots=True)
class ResponseHeading:
    """What every state of one answer has."""

    body: ResponsesBody
    model: str
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def document(self, status: str, output: list[Json], **more: Json | None) -> Json:
        """Return the answer in one of its states."""
        body = self.body
        reasoning, text = body.reasoning, body.text
        parallel = body.parallel_tool_calls is not False
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": parallel,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (text and text.format) or {"type": "text"}},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **more,
        }


class ResponseAnswer:
    """One answer while it comes: its items, and what became of it."""

    def __init__(self, heading: ResponseHeading, new_parser: NewParser) -> None:
        self.heading = heading
        self.finish = FinishCode.RUNNING
        self._answer = ChatAnswer.new(TextStyle(), new_parser)
        self._reader = BlockReader()
        self._ids: list[str] = []
        self._num_reasoning = 0
        # Whether the last block ended before the model had ended it.
        self._was_cut = False

    def steps(self, chunk: TokenChunk) -> Iterator[BlockStep]:
        """Yield what a chunk does to the blocks, as it is done."""
        # Token by token, so that those of the reasoning are counted alike, whole or streamed.
        for one in token_by_token(chunk):
            self.finish = one.finish
            yield from self._reader.read(self._answer.deltas(one))
            blocks = self._reader.blocks
            if blocks and all(each.kind == "reasoning" for each in blocks):
                self._num_reasoning += len(one.tokens.ids)
        if self.finish is not FinishCode.RUNNING:
            self._was_cut = self.finish is FinishCode.LENGTH
            yield from self._reader.close()

    def id_of(self, block: Block) -> str:
        """Return the id of a block's item."""
        while len(self._ids) <= block.index:
            kind = self._reader.blocks[len(self._ids)].kind
            self._ids.append(f"{_PREFIXES[kind]}_{uuid.uuid4().hex}")
        return self._ids[block.index]

    def item(self, block: Block, *, is_new: bool = False) -> Json:
        """Return a block as an item, or as the item that it begins as."""
        item: Json = {
            "id": self.id_of(block),
            "type": _KINDS[block.kind],
            "status": "in_progress" if is_new else self._status_of(block),
        }
        parts = [] if is_new else [part(block)]
        match block.kind:
            case "text":
                return {**item, "role": "assistant", "content": parts}
            case "reasoning":
                return {**item, "summary": [], "content": parts, "encrypted_content": None}
        arguments = "" if is_new else block.text
        return {**item, "call_id": block.call_id, "name": block.name, "arguments": arguments}

    def document(self, num_prompt: int, num_cached: int, num_generated: int) -> Json:
        """Return the whole answer."""
        output = [self.item(each) for each in self._reader.blocks]
        used = {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": num_cached},
            "output_tokens": num_generated,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": num_prompt + num_generated,
        }
        if self.finish is FinishCode.LENGTH:
            why = {"reason": "max_output_tokens"}
            return self.heading.document("incomplete", output, incomplete_details=why, usage=used)
        return self.heading.document("completed", output, usage=used)

    def failed(self, error: LoraxError) -> Json:
        """Return the answer that could not be finished, as far as it came."""
        self._was_cut = True
        output = [self.item(each) for each in self._reader.blocks]
        message = envelope(error, NAMES)["error"]["message"]
        why = {"code": "server_error", "message": message}
        return self.heading.document("failed", output, error=why)

    def _status_of(self, block: Block) -> str:
        is_last = block.index == len(self._reader.blocks) - 1
        return "incomplete" if is_last and self._was_cut else "completed"


def response_document(heading: ResponseHeading, result: GenerateResult) -> Json:
    """Return the answer to a request that was not streamed."""
    answer = ResponseAnswer(heading, result.new_parser)
    sequence = result.sequences[0]
    for _ in answer.steps(sequence.chunk):
        pass
    return answer.document(
        result.num_prompt_tokens, result.num_cached_tokens, sequence.num_generated
    )


class ResponseEvents:
    """The events of a streamed answer; an EventWriter."""

    def __init__(self, heading: ResponseHeading) -> None:
        self._heading = heading
        self._num_events = 0
        self._answer = ResponseAnswer(heading, OutputParser)
        self._has_begun = False

    def begin(self, stream: BatchStream) -> bytes:
        """Return the events of an answer that has no output yet."""
        self._stream = stream
        new_parser = stream.streams[0].request.new_parser
        self._answer = ResponseAnswer(self._heading, new_parser)
        return self._begin()

    def _begin(self) -> bytes:
        self._has_begun = True
        started = self._heading.document("in_progress", [])
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event(kind, {"response": started}) for kind in kinds)

    def chunk(self, sequence: int, chunk: TokenChunk) -> bytes:
        """Return the events of a chunk; none where it shows nothing yet."""
        return b"".join(
            self._event(kind, fields)
            for step in self._answer.steps(chunk)
            for kind, fields in self._of_step(step)
        )

    def end(self) -> bytes:
        """Return the whole answer as the last event."""
        stream = self._stream
        document = self._answer.document(
            stream.num_prompt_tokens, stream.num_cached, stream.num_generated
        )
        return self._event(f"response.{document['status']}", {"response": document})

    def failure(self, error: LoraxError) -> bytes:
        """Return the answer as far as it came, with its error, as the last event."""
        # A response that was kept alive while it waited may have sent no event yet.
        events = b"" if self._has_begun else self._begin()
        return events + self._event("response.failed", {"response": self._answer.failed(error)})

    def refusal(self, error: LoraxError) -> Response:
        """Return the response of an error."""
        return openai_error_response(error, NAMES)

    def _event(self, kind: str, fields: Json) -> bytes:
        document = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + dumps(document) + b"\n\n"

    def _of_step(self, step: BlockStep) -> Iterator[tuple[str, Json]]:
        """Yield the events of a step."""
        block, answer = step.block, self._answer
        at: Json = {"item_id": answer.id_of(block), "output_index": block.index}
        name = _EVENTS[block.kind]
        if block.kind != "call":
            within = {**at, "content_index": 0}
        else:
            within = at
        match step.verb:
            case "begin":
                item = answer.item(block, is_new=True)
                yield "response.output_item.added", {"output_index": block.index, "item": item}
                if block.kind != "call":
                    empty = part(Block(block.index, block.kind))
                    yield "response.content_part.added", {**within, "part": empty}
            case "more":
                yield f"{name}.delta", {**within, "delta": step.text, **_LOGPROBS[block.kind]}
            case "end":
                yield f"{name}.done", {**within, **_whole(block)}
                if block.kind != "call":
                    yield "response.content_part.done", {**within, "part": part(block)}
                item = answer.item(block)
                yield "response.output_item.done", {"output_index": block.index, "item": item}


_EVENTS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
_LOGPROBS: dict[str, Json] = {"text": {"logprobs": []}, "reasoning": {}, "call": {}}


def _whole(block: Block) -> Json:
    if block.kind == "call":
        return {"name": block.name, "arguments": block.text}
    return {"text": block.text, **_LOGPROBS[block.kind]}


def part(block: Block) -> Json:
    """Return what a text or a reasoning has as its content."""
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
