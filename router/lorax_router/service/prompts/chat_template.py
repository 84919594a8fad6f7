"""Chat templates as data: where they come from, and which special tokens they may write.

Compiling and rendering them is ``sandbox``'s affair, in processes of their own.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_router.service.prompts.sandbox import InvalidTemplateError, compile_template

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
# Further templates by name, one a file.
_TEMPLATE_FOLDER = "additional_chat_templates"
_DEFAULT = "default"
_TOOL_USE = "tool_use"
# What a model whose templates all have other names says without tools.
_NO_DEFAULT = (
    "{{ raise_exception('it is one of several by name, none of which is called \"default\"') }}"
)
_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's text, the special tokens it may write, and whose it is."""

    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    owner: str = "this model"
    # The text for chats with tools, where it is another one.
    tool_use: str | None = None
    # Equal for templates that write the same.
    key: str = field(init=False)

    def __post_init__(self) -> None:
        parts = json.dumps([self.text, sorted(self.special_tokens.items()), self.tool_use])
        object.__setattr__(self, "key", hashlib.sha256(parts.encode()).hexdigest())

    def of(self, owner: str) -> ChatTemplate:
        """Return the same template as another's."""
        same = copy.copy(self)
        object.__setattr__(same, "owner", owner)
        return same

    def chosen(self, *, with_tools: bool) -> ChatTemplate:
        """Return the one for chats with or without tools, as transformers chooses."""
        if self.tool_use is None:
            return self
        text = self.tool_use if with_tools else self.text
        return ChatTemplate(text, self.special_tokens, self.owner)

    @property
    def num_chars(self) -> int:
        """How long it is, with what it may write."""
        return (
            len(self.text) + len(self.tool_use or "") + sum(map(len, self.special_tokens.values()))
        )


def load_chat_template(
    tokenizer_dir: str, override: str | None = None, text: str | None = None
) -> ChatTemplate | None:
    """Find the template of a model; None if it has none.

    Args:
        tokenizer_dir: the folder of the model's tokenizer.
        override: a tokenizer_config.json or a .jinja file to read instead.
        text: the template itself, or a file that holds it; nothing else is used then.

    Raises StartupError when a file that is there cannot be read or compiled.
    """
    folder = Path(tokenizer_dir)
    config_path = folder / _CONFIG_FILE
    config = _read_json(config_path) if config_path.is_file() else {}
    named = _files_of(folder) or _templates_of(config)
    if override is not None:
        if override.endswith(".json"):
            overriding = _read_json(Path(override))
            named, config = _templates_of(overriding) or named, {**config, **overriding}
        else:
            named = {_DEFAULT: _read_text(Path(override))}
    if text is not None:
        named = {_DEFAULT: _given_template(text)}
    template = _template(named, config)
    # The operator chose it, so it may be compiled here.
    for each in () if template is None else (template.text, template.tool_use):
        _require_valid(each or "", (text and "--chat-template") or override or tokenizer_dir)
    return template


def load_special_tokens(tokenizer_dir: str) -> dict[str, str]:
    """Return a model's special tokens by name; raises StartupError for a file that is no JSON."""
    path = Path(tokenizer_dir) / _CONFIG_FILE
    return _special_tokens(_read_json(path)) if path.is_file() else {}


def template_of_files(
    files: Mapping[str, bytes], owner: str, special_tokens: Mapping[str, str] | None = None
) -> ChatTemplate | None:
    """Return the template among an adapter's files; None if there is none. Runs nothing of it.

    Raises ValueError for files that cannot be read.

    Args:
        files: by name.
        owner: whose they are.
        special_tokens: the model's, which are the adapter's where no file has its own.
    """
    config = _json_object(files.get(_CONFIG_FILE))
    named = _templates_of(config)
    if (document := files.get("chat_template.json")) is not None:
        named = _templates_of(_json_object(document)) or named
    if (raw := files.get(_TEMPLATE_FILE)) is not None:
        named = {_DEFAULT: raw.decode("utf-8")}
    template = _template(named, config, owner)
    if template is None or _CONFIG_FILE in files or not special_tokens:
        return template
    return replace(template, special_tokens=special_tokens)


def _template(
    named: Mapping[str, str], config: Mapping[str, object], owner: str = "this model"
) -> ChatTemplate | None:
    """Of several templates by name transformers uses two when nobody names one."""
    if not named:
        return None
    text = named.get(_DEFAULT, _NO_DEFAULT)
    return ChatTemplate(text, _special_tokens(config), owner, named.get(_TOOL_USE))


def _files_of(folder: Path) -> dict[str, str]:
    """Templates in files of their own, by name; where there are any the configuration's go."""
    paths = {path.stem: path for path in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / _TEMPLATE_FILE).is_file():
        paths[_DEFAULT] = folder / _TEMPLATE_FILE
    return {name: _read_text(path) for name, path in paths.items()}


def _given_template(given: str) -> str:
    """Return a template that is given as it is, or as the path of its file."""
    if any(sign in given for sign in "{}\n"):
        return given
    return _read_text(Path(given))


def _require_valid(text: str, source: str) -> None:
    try:
        compile_template(text)
    except InvalidTemplateError as error:
        raise StartupError(
            f"the chat template of {source} is not valid: {error}; "
            "give another with --chat-template",
            ExitCode.TOKENIZER_UNUSABLE,
        ) from error


def _json_object(raw: bytes | None) -> dict[str, object]:
    # Of the fast kind: the largest have a megabyte, and streams wait meanwhile.
    if raw is None:
        return {}
    # A package of front ends: a bare machine serves models whose adapters bring no texts.
    import orjson

    document = orjson.loads(raw)
    return document if isinstance(document, dict) else {}


def _templates_of(config: Mapping[str, object]) -> dict[str, str]:
    """The templates of a tokenizer_config.json by name: one text is the default."""
    template = config.get("chat_template")
    if isinstance(template, str):
        return {_DEFAULT: template}
    if isinstance(template, list):
        entries = [each for each in template if isinstance(each, dict)]
        named = [(each.get("name"), each.get("template")) for each in entries]
    else:
        named = list(template.items()) if isinstance(template, dict) else []
    return {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Special tokens by name; a token is a text or an object with its text in ``content``."""
    tokens = {}
    for name in _SPECIAL_TOKENS:
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
