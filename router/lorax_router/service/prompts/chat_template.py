"""Renders messages into a prompt by the model's own chat template.

Templates come with model files, so they run in a sandbox that can neither change
what it is given nor reach into Python objects. The names they may use are those
that transformers offers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorax_contract import errors
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode

Message = Mapping[str, Any]

_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A template's text and the special tokens it may write."""

    text: str | None
    special_tokens: Mapping[str, str]


class ChatTemplate:
    """One compiled chat template; without a text it refuses every request in words."""

    def __init__(self, source: TemplateSource, now: Callable[[], datetime] = datetime.now) -> None:
        self._special_tokens = dict(source.special_tokens)
        self._template = None if source.text is None else _compile(source.text, now)

    @property
    def is_present(self) -> bool:
        """Whether the model has a template."""
        return self._template is not None

    def render(self, messages: Sequence[Message], **variables: object) -> str:
        """Return the prompt that ends where the assistant speaks; raises TemplateError."""
        if self._template is None:
            raise errors.TemplateError("this model has no chat template; send the prompt as it is")
        values = {**self._special_tokens, "add_generation_prompt": True, **variables}
        try:
            return self._template.render(messages=list(messages), **values)
        except Exception as error:  # a template is foreign code: all it raises is its failure
            raise errors.TemplateError(f"the chat template failed: {error}") from error


def load_chat_template(tokenizer_dir: str, override: str | None = None) -> ChatTemplate:
    """Find the template of a model; ``override`` is a tokenizer_config.json or a .jinja file.

    Raises StartupError when a file that is there cannot be read or compiled.
    """
    folder = Path(tokenizer_dir)
    config_path = folder / "tokenizer_config.json"
    config = _read_json(config_path) if config_path.is_file() else {}
    text = _template_of(config)
    if (folder / _TEMPLATE_FILE).is_file():
        text = _read_text(folder / _TEMPLATE_FILE)
    if override is not None:
        if override.endswith(".json"):
            overriding = _read_json(Path(override))
            text, config = _template_of(overriding) or text, {**config, **overriding}
        else:
            text = _read_text(Path(override))
    try:
        return ChatTemplate(TemplateSource(text, _special_tokens(config)))
    except TemplateError as error:
        raise StartupError(
            f"the chat template of {override or tokenizer_dir} is not valid: {error}; "
            "give another with --tokenizer-config-path",
            ExitCode.TOKENIZER_UNUSABLE,
        ) from error


def template_of_files(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """Return the template among an adapter's files; None if there is none.

    Raises jinja2's TemplateError, UnicodeDecodeError or JSONDecodeError.
    """
    config = _json_object(files.get("tokenizer_config.json"))
    text = _template_of(config)
    if (document := files.get("chat_template.json")) is not None:
        text = _template_of(_json_object(document)) or text
    if (raw := files.get(_TEMPLATE_FILE)) is not None:
        text = raw.decode("utf-8")
    return None if text is None else ChatTemplate(TemplateSource(text, _special_tokens(config)))


def _json_object(raw: bytes | None) -> dict[str, object]:
    document = {} if raw is None else json.loads(raw)
    return document if isinstance(document, dict) else {}


class _Generation(Extension):
    """Renders what is between ``generation`` tags, which only mark text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(text: str, now: Callable[[], datetime]) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment.from_string(text)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _template_of(config: Mapping[str, object]) -> str | None:
    """The template of a tokenizer_config.json: one text, or the default of several named ones."""
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [each for each in template if isinstance(each, dict)]
        named = {each.get("name"): each.get("template") for each in entries}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Special tokens by name; a token is a text or an object with its text in ``content``."""
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(
            f"the chat template {path} cannot be read: {error}", ExitCode.TOKENIZER_UNUSABLE
        ) from error


def _read_json(path: Path) -> dict[str, object]:
    text = _read_text(path)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise StartupError(f"{path} is not JSON: {error}", ExitCode.TOKENIZER_UNUSABLE) from error
    if not isinstance(document, dict):
        raise StartupError(f"{path} must hold one JSON object", ExitCode.TOKENIZER_UNUSABLE)
    return document
