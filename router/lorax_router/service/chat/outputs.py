"""How the answers of the model that is served are read, and bound where they must be calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cachetools import LRUCache

from lorax_contract.constraint import Constraint
from lorax_contract.errors import TemplateError, ValidationError
from lorax_router.service.chat.forced_calls import constraint_of
from lorax_router.service.chat.hermes import HermesParser
from lorax_router.service.chat.output_parser import OutputParser
from lorax_router.service.chat.reasoning import ReasoningParser
from lorax_router.service.chat.tool_parser import ToolCallParser
from lorax_router.service.chat.tools import FunctionTool, ToolChoice
from lorax_router.service.requests import ChatPrompt

# How prompts end, by template options.
_MAX_ENDS = 256


class RendersChats(Protocol):
    """Makes a text of a chat."""

    async def render(self, chat: ChatPrompt) -> str:
        """Render by the model's template; raises TemplateError."""
        ...


class OutputParsers:
    """Makes the parser of each answer.

    Args:
        tool_parser: None: no calls are looked for.
        reasoning_parser: None: no reasoning is.
        special_tokens: ids of the tokenizer's special tokens.
        templates: renders by the model's template, to see how prompts end.
    """

    def __init__(
        self,
        tool_parser: type[ToolCallParser] | None = HermesParser,
        reasoning_parser: type[ReasoningParser] | None = None,
        special_tokens: Mapping[str, int] | None = None,
        templates: RendersChats | None = None,
    ) -> None:
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser
        self._special_tokens = special_tokens or {}
        self._templates = templates
        self._ends: LRUCache[str, bool] = LRUCache(_MAX_ENDS)

    def new(
        self, functions: Sequence[FunctionTool], choice: ToolChoice, prompt_text: str = ""
    ) -> OutputParser:
        """Return the parser of one answer; ``prompt_text`` is what it goes on with."""
        reasoning = tools = None
        if (reads := self.reasoning_parser) is not None:
            reasoning = reads(is_inside=reads.is_left_open(prompt_text))
        if self.tool_parser is not None and functions and choice.mode != "none":
            tools = self.tool_parser(functions)
        return OutputParser(reasoning, tools)

    async def constraint(
        self,
        functions: Sequence[FunctionTool],
        choice: ToolChoice,
        *,
        is_single: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Constraint | None:
        """Return what an answer is bound to by its tools; raises ValidationError in words."""
        is_strict = choice.mode == "auto" and any(tool.strict for tool in functions)
        if not choice.is_forced and not is_strict:
            return None
        if self.tool_parser is None:
            raise ValidationError(
                "`tool_choice`: this server reads no tool calls (--tool-call-parser none), so "
                "none can be forced and no tool can be strict"
            )
        return constraint_of(
            functions,
            choice,
            self.tool_parser,
            self._special_tokens,
            is_single=is_single,
            reasoning=self.reasoning_parser,
            is_inside=await self._opens_reasoning(dict(template_kwargs or {})),
        )

    async def _opens_reasoning(self, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether a prompt with these options ends within the reasoning: how any chat's does."""
        if self.reasoning_parser is None or self._templates is None:
            return False
        key = json.dumps(template_kwargs, sort_keys=True)
        if key not in self._ends:
            messages = [{"role": "user", "content": "a"}]
            chat = ChatPrompt(messages=messages, template_kwargs=template_kwargs)
            try:
                text = await self._templates.render(chat)
            except TemplateError:
                # The request's own prompt will say why.
                return False
            self._ends[key] = self.reasoning_parser.is_left_open(text)
        return self._ends[key]
