"""Reads one sequence's text: reasoning first, then content and tool calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lorax_router.service.chat.deltas import AssistantTurn, ChatDelta, ContentDelta
from lorax_router.service.chat.reasoning import ReasoningParser
from lorax_router.service.chat.tool_parser import ToolCallParser


class OutputParser:
    """What a chat's front end feeds the text of one sequence to.

    Args:
        reasoning: None: the text has none.
        tools: None: no call is looked for.
        is_single_call: calls after the first one are left out.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        tools: ToolCallParser | None = None,
        *,
        is_single_call: bool = False,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._is_single_call = is_single_call

    @property
    def markers(self) -> frozenset[str]:
        """Special tokens that must not be skipped in the text that is fed."""
        both = (each.markers for each in (self._reasoning, self._tools) if each is not None)
        return frozenset().union(*both)

    def feed(self, text: str) -> list[ChatDelta]:
        """Take in more of the text; return what is certain by now."""
        if not text:
            return []
        split = [ContentDelta(text)] if self._reasoning is None else self._reasoning.feed(text)
        return self._with_calls(split)

    def finish(self) -> list[ChatDelta]:
        """Return the rest: no more text comes."""
        deltas = self._with_calls([] if self._reasoning is None else self._reasoning.finish())
        return deltas if self._tools is None else [*deltas, *self._kept(self._tools.finish())]

    def _with_calls(self, split: Iterable[ChatDelta]) -> list[ChatDelta]:
        if self._tools is None:
            return list(split)
        deltas: list[ChatDelta] = []
        for delta in split:
            if isinstance(delta, ContentDelta):
                deltas.extend(self._kept(self._tools.feed(delta.text)))
            else:
                deltas.append(delta)
        return deltas

    def _kept(self, deltas: Iterable[ChatDelta]) -> Iterable[ChatDelta]:
        if not self._is_single_call:
            return deltas
        return [each for each in deltas if getattr(each, "index", 0) == 0]


# Makes the parser of each answer to one prompt.
NewParser = Callable[[], OutputParser]


def parse(text: str, parser: OutputParser) -> AssistantTurn:
    """Return what a whole text says."""
    turn = AssistantTurn()
    turn.add(parser.feed(text))
    turn.add(parser.finish())
    return turn
