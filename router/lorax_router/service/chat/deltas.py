"""What parsers make of a text, piece by piece, and the whole of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of what the assistant says."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what it thinks before."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool is called; its arguments follow."""

    # Calls of one answer are counted from 0.
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArgumentsDelta:
    """More of the arguments of a call that has started."""

    index: int
    text: str = field(repr=False)


ChatDelta = ContentDelta | ReasoningDelta | ToolCallStart | ToolArgumentsDelta


@dataclass(slots=True)
class ToolCall:
    """One call, whole; the arguments are the text that the model wrote."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class AssistantTurn:
    """All that deltas say, put together."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, deltas: Iterable[ChatDelta]) -> None:
        """Take in what comes next."""
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    self.content += text
                case ReasoningDelta(text):
                    self.reasoning += text
                case ToolCallStart(_, call_id, name):
                    self.tool_calls.append(ToolCall(call_id, name))
                case ToolArgumentsDelta(index, text):
                    self.tool_calls[index].arguments += text
