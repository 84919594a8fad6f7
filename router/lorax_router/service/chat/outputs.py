"""How answers are read, and bound where they must be calls: as the chat template has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cachetools import LRUCache

from lorax_contract.constraint import Constraint
from lorax_contract.errors import ValidationError
from lorax_router.service.chat.forced_calls import constraint_of
from lorax_router.service.chat.hermes import HermesParser
from lorax_router.service.chat.output_parser import OutputParser
from lorax_router.service.chat.reasoning import ReasoningParser
from lorax_router.service.chat.tool_parser import ToolCallParser
from lorax_router.service.chat.tools import tools_of
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.requests import ChatPrompt

# Adapters' own templates whose parsers are known.
_MAX_TEMPLATES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerReading:
    """Which parsers read the answers to one chat; makes one for each answer.

    ``is_inside``: the prompt ends within the reasoning.
    """

    prompt: ChatPrompt = field(repr=False)
    tool_parser: type[ToolCallParser] | None
    reasoning_parser: type[ReasoningParser] | None
    is_inside: bool = False

    def __call__(self) -> OutputParser:
        """Return the parser of one answer."""
        reasoning = tools = None
        if self.reasoning_parser is not None:
            reasoning = self.reasoning_parser(is_inside=self.is_inside)
        choice = self.prompt.tool_choice
        if self.tool_parser is not None and self.prompt.tools and choice.mode != "none":
            tools = self.tool_parser(tools_of(self.prompt.tools))
        return OutputParser(reasoning, tools, is_single_call=choice.is_single)


class OutputParsers:
    """Makes the parser of each answer to the prompts of one template.

    Args:
        tool_parser: None: no calls are looked for.
        reasoning_parser: None: no reasoning is.
        special_tokens: ids of the tokenizer's special tokens.
    """

    def __init__(
        self,
        tool_parser: type[ToolCallParser] | None = HermesParser,
        reasoning_parser: type[ReasoningParser] | None = None,
        special_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser
        self._special_tokens = special_tokens or {}

    def new(self, prompt: ChatPrompt, prompt_text: str = "") -> OutputParser:
        """Return the parser of one answer; ``prompt_text`` is what it goes on with."""
        return self.reading(prompt, prompt_text)()

    def reading(self, prompt: ChatPrompt, prompt_text: str) -> AnswerReading:
        """Return which parsers read the answers to a chat."""
        reads = self.reasoning_parser
        return AnswerReading(
            prompt=prompt,
            tool_parser=self.tool_parser,
            reasoning_parser=reads,
            is_inside=reads is not None and reads.is_left_open(prompt_text),
        )

    def constraint(
        self, prompt: ChatPrompt, prompt_text: str = "", content: Constraint | None = None
    ) -> Constraint | None:
        """Return what an answer is bound to; raises ValidationError in words.

        Args:
            prompt: its tools may bind it.
            prompt_text: what the answer goes on with.
            content: what the request binds its text to; calls and reasoning are no part of that.
        """
        if not prompt.is_answer_read:
            return content
        functions, choice = tools_of(prompt.tools or ()), prompt.tool_choice
        is_strict = choice.mode == "auto" and any(tool.strict for tool in functions)
        reads, tool_parser = self.reasoning_parser, self.tool_parser
        if tool_parser is None:
            if choice.is_forced or is_strict:
                raise ValidationError(
                    "`tool_choice`: this server reads no tool calls (--tool-call-parser none), so "
                    "none can be forced and no tool can be strict"
                )
            functions, tool_parser = [], ToolCallParser
        return constraint_of(
            functions,
            choice,
            tool_parser,
            self._special_tokens,
            is_single=choice.is_single,
            reasoning=reads,
            is_inside=reads is not None and reads.is_left_open(prompt_text),
            content=content,
        )


class OutputsByTemplate:
    """The parsers of the model's chat template, and of those that adapters bring.

    Args:
        base: those of the model's own.
        template: the model's own; None: it has none.
        choose: returns those of another one; None: all are read as the model's.
    """

    def __init__(
        self,
        base: OutputParsers,
        template: ChatTemplate | None = None,
        choose: Callable[[ChatTemplate], OutputParsers] | None = None,
    ) -> None:
        self._base = base
        self._template = template
        self._choose = choose
        self._known: LRUCache[str, OutputParsers] = LRUCache(_MAX_TEMPLATES)

    def of(self, own: ChatTemplate | None) -> OutputParsers:
        """Return those of an adapter's own template; None: it has none."""
        if own is None or self._choose is None:
            return self._base
        if self._template is not None and own.key == self._template.key:
            return self._base
        if own.key not in self._known:
            self._known[own.key] = self._choose(own)
        return self._known[own.key]
