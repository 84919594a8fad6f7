"""Which parsers read answers: by flag, by the chat template of the model or adapter, by family."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from tokenizers import Tokenizer

from lorax_contract.config import RouterConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_router.service.chat.hermes import HermesParser
from lorax_router.service.chat.llama import LlamaJsonParser
from lorax_router.service.chat.mistral import MistralArgumentsParser, MistralParser
from lorax_router.service.chat.outputs import OutputParsers, OutputsByTemplate
from lorax_router.service.chat.pythonic import PythonicParser
from lorax_router.service.chat.qwen_coder import QwenCoderParser
from lorax_router.service.chat.reasoning import ReasoningParser, ThinkParser
from lorax_router.service.chat.tool_parser import ToolCallParser
from lorax_router.service.prompts.chat_template import ChatTemplate

# By the names that vLLM's users know.
TOOL_PARSERS: Mapping[str, type[ToolCallParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaJsonParser,
    "llama4_json": LlamaJsonParser,
    "llama4_pythonic": PythonicParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "qwen3_coder": QwenCoderParser,
    "qwen3_xml": QwenCoderParser,
}
REASONING_PARSERS: Mapping[str, type[ReasoningParser]] = {
    "think": ThinkParser,
    "deepseek_r1": ThinkParser,
    "qwen3": ThinkParser,
}

# What a template says of the calls that it asks for; the first that is all there.
_SIGNS: tuple[tuple[tuple[str, ...], type[ToolCallParser]], ...] = (
    (("[TOOL_CALLS]", "[ARGS]"), MistralArgumentsParser),
    (("[TOOL_CALLS]",), MistralParser),
    (("<function=", "<parameter="), QwenCoderParser),
    (("<tool_call>",), HermesParser),
    (("<|python_start|>",), PythonicParser),
    (("[func_name1(",), PythonicParser),
    (("<|python_tag|>",), LlamaJsonParser),
    (('"name"', '"parameters"', "ipython"), LlamaJsonParser),
)
_FAMILIES: Mapping[str, type[ToolCallParser]] = {
    "llama4": PythonicParser, "ministral": MistralParser, "mistral": MistralParser,
    "mistral3": MistralParser, "mixtral": MistralParser,
}  # fmt: skip

Parser = TypeVar("Parser", ToolCallParser, ReasoningParser)


def outputs_by_template(
    config: RouterConfig, tokenizer: Tokenizer, template: ChatTemplate | None, model_type: str
) -> OutputsByTemplate:
    """Return what reads the answers of the model and its adapters; raises StartupError."""
    added = tokenizer.get_added_tokens_decoder()
    special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
    text = _text_of(template)
    base = choose_tool_parser(
        config.tool_call_parser,
        template=text,
        model_type=model_type,
        plugin=config.tool_parser_plugin,
    )

    def of_adapter(own: ChatTemplate) -> OutputParsers:
        tools, text = base, _text_of(own)
        if config.tool_parser_plugin is None:
            # What says nothing of calls changes nothing about them.
            tools = choose_tool_parser(config.tool_call_parser, template=text, otherwise=base)
        reasoning = choose_reasoning_parser(config.reasoning_parser, template=text)
        return OutputParsers(tools, reasoning, special_tokens)

    reasoning = choose_reasoning_parser(config.reasoning_parser, template=text)
    parsers = OutputParsers(base, reasoning, special_tokens)
    return OutputsByTemplate(parsers, template, of_adapter)


def _text_of(template: ChatTemplate | None) -> str | None:
    return None if template is None else template.text + (template.tool_use or "")


def choose_tool_parser(
    name: str,
    *,
    template: str | None,
    model_type: str = "",
    plugin: str | None = None,
    otherwise: type[ToolCallParser] | None = HermesParser,
) -> type[ToolCallParser] | None:
    """Return the parser of tool calls; None: none is wanted. Raises StartupError.

    Args:
        name: ``auto``, ``none`` or a name of TOOL_PARSERS.
        template: the text of the model's chat template.
        model_type: the model's family, as its configuration names it.
        plugin: ``module:Class`` of a parser of the operator's, which is used then.
        otherwise: what ``auto`` takes where neither template nor family say anything.
    """
    if plugin is not None:
        parser: type[ToolCallParser] = _imported(plugin, ToolCallParser, "--tool-parser-plugin")
        return parser
    if name == "none":
        return None
    if name == "auto":
        return _of_template(template or "") or _FAMILIES.get(model_type, otherwise)
    chosen = _named(name, TOOL_PARSERS, "--tool-call-parser")
    # Which of its two forms the model writes shows in the template alone.
    is_newer = chosen is MistralParser and template is not None and "[ARGS]" in template
    return MistralArgumentsParser if is_newer else chosen


def choose_reasoning_parser(name: str, *, template: str | None) -> type[ReasoningParser] | None:
    """Return the parser of reasoning; None: none is wanted. Raises StartupError."""
    if name == "none":
        return None
    if name == "auto":
        return ThinkParser if "</think>" in (template or "") else None
    return _named(name, REASONING_PARSERS, "--reasoning-parser")


def _of_template(text: str) -> type[ToolCallParser] | None:
    return next((parser for signs, parser in _SIGNS if all(sign in text for sign in signs)), None)


def _named(name: str, known: Mapping[str, type[Parser]], flag: str) -> type[Parser]:
    if name not in known:
        raise StartupError(
            f"{flag} must be auto, none or one of {', '.join(known)}, not {name!r}",
            ExitCode.BAD_CONFIG,
        )
    return known[name]


def _imported(path: str, base: type, flag: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise StartupError(
            f"{flag} {path} cannot be imported: {error}; give module:Class",
            ExitCode.BAD_CONFIG,
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise StartupError(f"{flag} {path} is no {base.__name__}", ExitCode.BAD_CONFIG)
    return found
