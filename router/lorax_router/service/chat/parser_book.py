"""The parsers of answers by the names of their classes: how one process tells another of them."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_router.service.chat.choice import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    choose_tool_parser,
)
from lorax_router.service.chat.mistral import MistralArgumentsParser
from lorax_router.service.chat.reasoning import ReasoningParser
from lorax_router.service.chat.tool_parser import ToolCallParser


class ParserBook:
    """Every parser that an answer may need.

    Args:
        tool_parsers: of calls, in place of one of that name before it.
        reasoning_parsers: of reasoning.
    """

    def __init__(
        self,
        tool_parsers: Iterable[type[ToolCallParser]] = (),
        reasoning_parsers: Iterable[type[ReasoningParser]] = (),
    ) -> None:
        own: list[type[ToolCallParser]] = [*TOOL_PARSERS.values(), MistralArgumentsParser]
        self._tools = {each.__name__: each for each in (*own, *tool_parsers)}
        both: tuple[type[ReasoningParser], ...] = (*REASONING_PARSERS.values(), *reasoning_parsers)
        self._reasoning = {each.__name__: each for each in both}

    @classmethod
    def with_plugin(cls, path: str | None) -> ParserBook:
        """Return all parsers with the operator's own; raises StartupError if it is none."""
        own = None if path is None else choose_tool_parser("auto", template=None, plugin=path)
        return cls([] if own is None else [own])

    @property
    def tool_parsers(self) -> list[type[ToolCallParser]]:
        """All parsers of calls."""
        return [*self._tools.values()]

    def tool_parser(self, name: str | None) -> type[ToolCallParser] | None:
        """Return the parser of a name; None has none."""
        return None if name is None else self._tools[name]

    def reasoning_parser(self, name: str | None) -> type[ReasoningParser] | None:
        """Return the parser of a name; None has none."""
        return None if name is None else self._reasoning[name]
