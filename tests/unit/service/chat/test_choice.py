"""Which parser a model gets: by its template, by its family, by flag, by a plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.helpers.chat_formats import FORMATS
from tests.helpers.router_process import config_of
from tests.helpers.tiny_tokenizers import byte_level

from lorax_contract.errors import StartupError
from lorax_router.service.chat.choice import (
    TOOL_PARSERS,
    choose_reasoning_parser,
    choose_tool_parser,
    outputs_by_template,
)
from lorax_router.service.chat.hermes import HermesParser
from lorax_router.service.chat.llama import LlamaJsonParser
from lorax_router.service.chat.mistral import MistralArgumentsParser, MistralParser
from lorax_router.service.chat.pythonic import PythonicParser
from lorax_router.service.chat.qwen_coder import QwenCoderParser
from lorax_router.service.chat.reasoning import ThinkParser
from lorax_router.service.prompts.chat_template import ChatTemplate

HERE = "tests.unit.service.chat.test_choice"


class OwnParser(HermesParser):
    """A parser of an operator's."""


@pytest.mark.parametrize(
    ("template", "model_type", "parser"),
    [
        (FORMATS["tags"], "qwen3", HermesParser),
        (FORMATS["headers"], "llama", LlamaJsonParser),
        (FORMATS["brackets"], "mistral", MistralParser),
        (FORMATS["brackets"] + "[ARGS]", "mistral", MistralArgumentsParser),
        (FORMATS["turns"], "gemma3", HermesParser),
        ("<tool_call> <function= <parameter=", "qwen3_moe", QwenCoderParser),
        ("<|python_start|>", "llama4", PythonicParser),
        ("", "llama4", PythonicParser),
        ("", "mixtral", MistralParser),
        (None, "llama", HermesParser),
    ],
)
def test_a_model_shows_how_it_calls(template: str | None, model_type: str, parser: type) -> None:
    assert choose_tool_parser("auto", template=template, model_type=model_type) is parser


def test_a_flag_names_the_parser() -> None:
    for name, parser in TOOL_PARSERS.items():
        assert choose_tool_parser(name, template="", model_type="") is parser
    newer = choose_tool_parser("mistral", template="[ARGS]", model_type="")
    assert newer is MistralArgumentsParser
    assert choose_tool_parser("none", template="<tool_call>", model_type="") is None


def test_a_plugin_is_used_before_all() -> None:
    chosen = choose_tool_parser("none", template="", model_type="", plugin=f"{HERE}:OwnParser")
    assert chosen is not None
    assert chosen.__name__ == "OwnParser"


@pytest.mark.parametrize(
    ("name", "plugin", "reason"),
    [
        ("hermess", None, "--tool-call-parser must be auto, none or one of hermes, .* 'hermess'"),
        ("auto", "no.such:Thing", "--tool-parser-plugin no.such:Thing cannot be imported"),
        ("auto", "json", "cannot be imported"),
        ("auto", "json:nothing", "cannot be imported"),
        ("auto", ":x", "cannot be imported"),
        ("auto", "json:JSONDecoder", "is no ToolCallParser"),
        ("auto", "json:loads", "is no ToolCallParser"),
    ],
)
def test_a_parser_that_is_not_there_ends_the_start(
    name: str, plugin: str | None, reason: str
) -> None:
    with pytest.raises(StartupError, match=reason):
        choose_tool_parser(name, template="", model_type="", plugin=plugin)


def test_reasoning_is_looked_for_where_the_template_has_it() -> None:
    assert choose_reasoning_parser("auto", template=FORMATS["tags"]) is ThinkParser
    assert choose_reasoning_parser("auto", template=FORMATS["turns"]) is None
    assert choose_reasoning_parser("auto", template=None) is None
    assert choose_reasoning_parser("deepseek_r1", template=None) is ThinkParser
    assert choose_reasoning_parser("none", template=FORMATS["tags"]) is None
    with pytest.raises(StartupError, match="--reasoning-parser must be auto"):
        choose_reasoning_parser("thinking", template=None)


def parsers_of(
    folder: Path, base: str, own: str | None, **config: Any
) -> tuple[type | None, type | None]:
    """Return what reads the answers of an adapter whose own template is ``own``."""
    template = ChatTemplate(FORMATS[base])
    outputs = outputs_by_template(config_of(folder, **config), byte_level(), template, "llama")
    found = outputs.of(None if own is None else ChatTemplate(FORMATS.get(own, own)))
    return found.tool_parser, found.reasoning_parser


@pytest.mark.parametrize(
    ("base", "own", "tools", "reasoning"),
    [
        ("headers", None, LlamaJsonParser, None),
        ("headers", "headers", LlamaJsonParser, None),
        ("headers", "tags", HermesParser, ThinkParser),
        ("tags", "brackets", MistralParser, None),
        # Says nothing of calls.
        ("brackets", "turns", MistralParser, None),
        ("turns", "{{ messages }}</think>", HermesParser, ThinkParser),
    ],
)
def test_an_adapter_with_a_template_of_its_own_shows_how_it_calls(
    base: str, own: str | None, tools: type, reasoning: type | None, tmp_path: Path
) -> None:
    assert parsers_of(tmp_path, base, own) == (tools, reasoning)


def test_a_flag_is_for_adapters_too(tmp_path: Path) -> None:
    named = {"tool_call_parser": "pythonic", "reasoning_parser": "none"}
    assert parsers_of(tmp_path, "headers", "tags", **named) == (PythonicParser, None)
    none = {"tool_call_parser": "none", "reasoning_parser": "think"}
    assert parsers_of(tmp_path, "headers", "tags", **none) == (None, ThinkParser)
    newer = {"tool_call_parser": "mistral"}
    own = "[TOOL_CALLS] [ARGS]"
    assert parsers_of(tmp_path, "brackets", own, **newer) == (MistralArgumentsParser, None)
    plugin, _ = parsers_of(tmp_path, "headers", "tags", tool_parser_plugin=f"{HERE}:OwnParser")
    assert plugin is not None
    assert plugin.__name__ == "OwnParser"


def test_templates_that_write_the_same_share_their_parsers(tmp_path: Path) -> None:
    template = ChatTemplate(FORMATS["tags"])
    outputs = outputs_by_template(config_of(tmp_path), byte_level(), template, "llama")
    # Read once, and the base's for one that writes what the base's does.
    assert outputs.of(ChatTemplate(FORMATS["headers"])) is outputs.of(
        ChatTemplate(FORMATS["headers"], owner="another")
    )
    assert outputs.of(ChatTemplate(FORMATS["tags"], owner="an adapter")) is outputs.of(None)
