"""What a model's files say of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from lorax_contract.config import RouterConfig
from lorax_router.service.prompts.chat_template import (
    ChatTemplate,
    load_chat_template,
    load_special_tokens,
)
from lorax_router.service.prompts.tokenizer_pool import load_tokenizer


@dataclass(frozen=True, slots=True)
class Language:
    """What the model's files say of texts."""

    tokenizer: Tokenizer
    # None: the model has none.
    chat_template: ChatTemplate | None
    # By name.
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def load_language(config: RouterConfig) -> Language:
    """Read tokenizer and chat template; raises StartupError when one is unusable."""
    folder = config.tokenizer_dir
    template = load_chat_template(folder, config.tokenizer_config_path, config.chat_template)
    special_tokens = load_special_tokens(folder) if template is None else template.special_tokens
    return Language(load_tokenizer(folder), template, special_tokens)
