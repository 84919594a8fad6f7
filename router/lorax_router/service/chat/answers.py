"""One answer of a chat while it comes: the same for all front ends, streamed or whole."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_contract.step import FinishCode
from lorax_router.service.chat.deltas import ChatDelta, ToolCallStart
from lorax_router.service.chat.output_parser import NewParser, OutputParser
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.text import TextAssembler, TextStyle


@dataclass(slots=True)
class ChatAnswer:
    """Makes the text of one sequence and reads what it says."""

    assembler: TextAssembler
    parser: OutputParser
    calls_tools: bool = False

    @classmethod
    def new(cls, style: TextStyle, new_parser: NewParser) -> ChatAnswer:
        """Return an answer that has not begun."""
        parser = new_parser()
        return cls(style.assembler(parser.markers), parser)

    @property
    def stopped_by(self) -> str | int | None:
        """The stop sequence or the id of the stop token that ended it."""
        return self.assembler.stopped_by

    def deltas(self, chunk: TokenChunk) -> list[ChatDelta]:
        """Return what a chunk says."""
        deltas = self.parser.feed(self.assembler.feed(chunk))
        if chunk.finish is not FinishCode.RUNNING:
            deltas = [*deltas, *self.parser.finish()]
        for delta in deltas:
            if isinstance(delta, ToolCallStart):
                self.calls_tools = True
        return deltas
