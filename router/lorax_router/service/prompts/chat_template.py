"""Chat templates as data: where they come from, and which special tokens they may write.

Compiling and rendering them is ``sandbox``'s affair, in processes of their own.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_router.service.prompts.sandbox import InvalidTemplateError, compile_template

_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's text, the special tokens it may write, and whose it is."""

    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    owner: str = "this model"
    # Equal for templates that write the same.
    key: str = field(init=False)

    def __post_init__(self) -> None:
        parts = json.dumps([self.text, sorted(self.special_tokens.items())])
        object.__setattr__(self, "key", hashlib.sha256(parts.encode()).hexdigest())

    def of(self, owner: str) -> ChatTemplate:
        """Return the same template as another's."""
        same = copy.copy(self)
        object.__setattr__(same, "owner", owner)
        return same

    @property
    def num_chars(self) -> int:
        """How long it is, with what it may write."""
        return len(self.text) + sum(map(len, self.special_tokens.values()))


def load_chat_template(tokenizer_dir: str, override: str | None = None) -> ChatTemplate | None:
    """Find the template of a model; ``override`` is a tokenizer_config.json or a .jinja file.

    None if it has none.

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
    if text is None:
        return None
    try:
        # The operator chose it, so it may be compiled here.
        compile_template(text)
    except InvalidTemplateError as error:
        raise StartupError(
            f"the chat template of {override or tokenizer_dir} is not valid: {error}; "
            "give another with --tokenizer-config-path",
            ExitCode.TOKENIZER_UNUSABLE,
        ) from error
    return ChatTemplate(text, _special_tokens(config))


def template_of_files(files: Mapping[str, bytes], owner: str) -> ChatTemplate | None:
    """Return the template among an adapter's files; None if there is none. Runs nothing of it.

    Raises ValueError for files that cannot be read.
    """
    config = _json_object(files.get("tokenizer_config.json"))
    text = _template_of(config)
    if (document := files.get("chat_template.json")) is not None:
        text = _template_of(_json_object(document)) or text
    if (raw := files.get(_TEMPLATE_FILE)) is not None:
        text = raw.decode("utf-8")
    return None if text is None else ChatTemplate(text, _special_tokens(config), owner)


def _json_object(raw: bytes | None) -> dict[str, object]:
    # Of the fast kind: the largest have a megabyte, and streams wait meanwhile.
    if raw is None:
        return {}
    # A package of front ends: a bare machine serves models whose adapters bring no texts.
    import orjson

    document = orjson.loads(raw)
    return document if isinstance(document, dict) else {}


def _template_of(config: Mapping[str, object]) -> str | None:
    """The template of a tokenizer_config.json: one text, or the default of several named ones."""
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [each for each in template if isinstance(each, dict)]
        template = next(
            (each.get("template") for each in reversed(entries) if each.get("name") == "default"),
            None,
        )
    return template if isinstance(template, str) else None


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
