"""What the answers of all chat dialects are made of: deltas by answer, and blocks of one kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lorax_contract.errors import ValidationError
from lorax_contract.step import FinishCode, TokenColumns
from lorax_router.service.chat.deltas import (
    ChatDelta,
    ContentDelta,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallStart,
)
from lorax_router.service.chat.output_parser import OutputParser
from lorax_router.service.chat.outputs import OutputParsers
from lorax_router.service.chat.tools import FunctionTool, ToolChoice, tools_of
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.requests import ChatPrompt, GenerateParameters
from lorax_router.service.text import TextAssembler

# Given the text of the prompt, which may have begun what the answer goes on with.
NewParser = Callable[[str], OutputParser]


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """What the model may call in one answer."""

    # As chat templates take them; empty: none are offered.
    definitions: list[dict[str, Any]]
    choice: ToolChoice
    # Whether at most one is called.
    is_single: bool = False

    @property
    def functions(self) -> list[FunctionTool]:
        """The tools as parsers take them."""
        return tools_of(self.definitions)


async def bound_by(
    outputs: OutputParsers, tools: OfferedTools, prompt: ChatPrompt, own: GenerateParameters
) -> GenerateParameters:
    """Return the parameters of a chat with what its tools bind the output to."""
    bound = await outputs.constraint(
        tools.functions,
        tools.choice,
        is_single=tools.is_single,
        template_kwargs=prompt.template_kwargs,
    )
    if bound is None:
        return own
    if own.constraint is not None:
        raise ValidationError(
            f"`{own.constraint.field_name}` and `tools` bind the output twice: a tool "
            "that is strict, or must be called, leaves no room for another form"
        )
    return replace(own, constraint=bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShape:
    """How the answers of one request look."""

    new_parser: NewParser
    stops: list[str] = field(default_factory=list)
    include_stop: bool = False
    skip_special_tokens: bool = True
    # Alternatives of each token; None: no logprobs.
    num_logprobs: int | None = None
    # Whether calls after the first one are left out.
    is_single_call: bool = False
    wants_usage: bool = False
    usage_with_each: bool = False

    def choice(self, index: int, prompt_text: str) -> ChatChoice:
        """Return one answer that has not begun."""
        parser = self.new_parser(prompt_text)
        assembler = TextAssembler(
            self.stops,
            include_stop=self.include_stop,
            skip_special_tokens=self.skip_special_tokens,
            markers=parser.markers,
        )
        return ChatChoice(index, assembler, parser, self.num_logprobs, self.is_single_call)


@dataclass(slots=True)
class ChatChoice:
    """One answer while it comes."""

    index: int
    assembler: TextAssembler
    parser: OutputParser
    num_logprobs: int | None
    is_single_call: bool
    calls_tools: bool = False

    def deltas(self, chunk: TokenChunk) -> list[ChatDelta]:
        """Return what a chunk says."""
        deltas = self.parser.feed(self.assembler.feed(chunk))
        if chunk.finish is not FinishCode.RUNNING:
            deltas = [*deltas, *self.parser.finish()]
        if self.is_single_call:
            deltas = [each for each in deltas if getattr(each, "index", 0) == 0]
        self.calls_tools = self.calls_tools or any(isinstance(d, ToolCallStart) for d in deltas)
        return deltas


BlockKind = Literal["text", "reasoning", "call"]


@dataclass(slots=True)
class Block:
    """A stretch of an answer that is all of one kind."""

    index: int
    kind: BlockKind
    # Of a call: its arguments.
    text: str = field(default="", repr=False)
    call_id: str = ""
    name: str = ""
    is_open: bool = True


@dataclass(frozen=True, slots=True)
class BlockStep:
    """A block begins, has more text, or ends."""

    verb: Literal["begin", "more", "end"]
    block: Block
    text: str = field(default="", repr=False)


class BlockReader:
    """Makes blocks of deltas, in the order in which the model said them."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def read(self, deltas: Iterable[ChatDelta]) -> Iterator[BlockStep]:
        """Yield what deltas do to the blocks, as it is done."""
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    yield from self._say("text", text)
                case ReasoningDelta(text):
                    yield from self._say("reasoning", text)
                case ToolCallStart(_, call_id, name):
                    yield from self._begin("call", call_id, name)
                case ToolArgumentsDelta(_, text):
                    yield self._more(text)

    def close(self) -> Iterator[BlockStep]:
        """Yield the end of the block that is open."""
        if self.blocks and self.blocks[-1].is_open:
            self.blocks[-1].is_open = False
            yield BlockStep("end", self.blocks[-1])

    def _say(self, kind: BlockKind, text: str) -> Iterator[BlockStep]:
        if not self.blocks or self.blocks[-1].kind != kind:
            yield from self._begin(kind)
        yield self._more(text)

    def _begin(self, kind: BlockKind, call_id: str = "", name: str = "") -> Iterator[BlockStep]:
        yield from self.close()
        block = Block(len(self.blocks), kind, call_id=call_id, name=name)
        self.blocks.append(block)
        yield BlockStep("begin", block)

    def _more(self, text: str) -> BlockStep:
        block = self.blocks[-1]
        block.text += text
        return BlockStep("more", block, text)


def token_by_token(chunk: TokenChunk) -> Iterator[TokenChunk]:
    """Yield a chunk as if each of its tokens had come by itself."""
    tokens, last = chunk.tokens, len(chunk.tokens.ids) - 1
    if last < 1:
        yield chunk
        return
    for place in range(last + 1):
        one = slice(place, place + 1)
        columns = TokenColumns(
            tokens.ids[one], tokens.logprobs[one], tokens.texts[one], tokens.special[one]
        )
        is_last = place == last
        yield TokenChunk(
            columns,
            chunk.finish if is_last else FinishCode.RUNNING,
            generated_text=chunk.generated_text if is_last else None,
        )
