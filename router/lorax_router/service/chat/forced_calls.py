"""What an answer is bound to by its tools and its request, reasoning before it left free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import ValidationError
from lorax_router.service.chat.grammars import CallWords, literal
from lorax_router.service.chat.reasoning import ReasoningParser
from lorax_router.service.chat.tool_parser import ToolCallParser
from lorax_router.service.chat.tools import FunctionTool, ToolChoice

_ANY_OBJECT = {"type": "object"}


def constraint_of(
    tools: Sequence[FunctionTool],
    choice: ToolChoice,
    parser: type[ToolCallParser],
    special_tokens: Mapping[str, int],
    *,
    is_single: bool = False,
    reasoning: type[ReasoningParser] | None = None,
    is_inside: bool = False,
    content: Constraint | None = None,
) -> Constraint | None:
    """Return what binds an answer to calls that the parser parses; None: it is free.

    Where no call is forced, an answer has either calls or its ``content``.

    Raises ValidationError in words.

    Args:
        tools: those of the request; of a named choice that one alone.
        choice: whether they are called.
        parser: what reads the answer.
        special_tokens: ids of markers that are special tokens.
        is_single: at most one call.
        reasoning: what reads the reasoning before that; None: there is none.
        is_inside: whether the prompt ends within it.
        content: what the request binds the text to; None: nothing.
    """
    if choice.is_forced:
        # There is no text.
        content = None
        is_single = is_single or choice.mode == "named"
        grammar = "answer: calls\n" + _alone(tools, parser, special_tokens, is_single)
    elif choice.mode == "auto" and tools and content is not None:
        # Beside a strict one the others must not be refused for what is unknown in them.
        tools = _as_bound(tools) if any(tool.strict for tool in tools) else tools
        calls = _alone(tools, parser, special_tokens, is_single)
        grammar = "answer: calls | content\n" + calls
    elif choice.mode == "auto" and any(tool.strict for tool in tools):
        grammar = _free(tools, parser, special_tokens, is_single)
    elif content is None or reasoning is None:
        return content
    else:
        grammar = "answer: content"
    rules = None if reasoning is None else reasoning.grammar(special_tokens, is_inside=is_inside)
    before = "" if rules is None else "reasoning " if is_inside else "reasoning? "
    text = "\n".join(filter(None, [f"start: {before}answer", grammar, rules]))
    if content is not None:
        return replace(content, frame=text)
    return Constraint(kind=ConstraintKind.LARK, text=text, field_name="tools")


def _alone(
    tools: Sequence[FunctionTool],
    parser: type[ToolCallParser],
    special_tokens: Mapping[str, int],
    is_single: bool,
) -> str:
    """Return the rule of calls with nothing around them."""
    marker = parser.begin_marker
    begin = literal(marker, special_tokens) if marker else ""
    words = CallWords(begin=begin, is_single=is_single, special_tokens=special_tokens)
    return _calls(tools, parser, words)


def _free(
    tools: Sequence[FunctionTool],
    parser: type[ToolCallParser],
    special_tokens: Mapping[str, int],
    is_single: bool,
) -> str:
    """Return a grammar of any text, in which what begins a call is followed by one."""
    tools = _as_bound(tools)
    words = CallWords(begin="begin", is_single=True, special_tokens=special_tokens)
    if not (marker := parser.begin_marker):
        words = replace(words, begin="", is_single=is_single)
        other = rf"OTHER: /{parser.other_begin}(.|\n)*/"
        return "\n".join(['answer: calls | OTHER | ""', other, _calls(tools, parser, words)])
    if marker in special_tokens:
        begin = f"begin: FREE {literal(marker, special_tokens)}"
    else:
        begin = f"begin[lazy]: FREE {literal(marker, {})}"
    answer = f"answer: calls{'?' if is_single else '*'} FREE"
    return "\n".join([answer, begin, r"FREE: /(.|\n)*/", _calls(tools, parser, words)])


def _as_bound(tools: Sequence[FunctionTool]) -> list[FunctionTool]:
    """Return tools of which those that are not strict take any arguments."""
    return [tool if tool.strict else replace(tool, parameters=_ANY_OBJECT) for tool in tools]


def _calls(tools: Sequence[FunctionTool], parser: type[ToolCallParser], words: CallWords) -> str:
    try:
        grammar = parser.grammar(tools, words)
    except RecursionError as error:
        raise ValidationError("`tools`: a schema of parameters nests too deeply") from error
    if grammar is None:
        raise ValidationError(
            "`tool_choice`: the calls of this model have no grammar, so none can be forced, no "
            "tool can be strict, and none goes with an output that is bound"
        )
    return grammar
