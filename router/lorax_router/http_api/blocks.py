"""Answers of chats as blocks, each of one kind, for the dialects that have them so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from lorax_contract.step import FinishCode
from lorax_router.service.chat.deltas import (
    ChatDelta,
    ContentDelta,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallStart,
)
from lorax_router.service.engine.port import TokenChunk

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
        is_last = place == last
        yield TokenChunk(
            tokens.part(place, place + 1),
            chunk.finish if is_last else FinishCode.RUNNING,
            generated_text=chunk.generated_text if is_last else None,
        )
