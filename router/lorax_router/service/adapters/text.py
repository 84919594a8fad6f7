"""What an adapter brings for texts: its own tokenizer, its own chat template, or the base's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_router.service.prompts.chat_template import ChatTemplate, template_of_files

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class AdapterText:
    """None: the base's is used."""

    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None


def read_text(name: str, files: Mapping[str, bytes]) -> AdapterText:
    """Return what an adapter's files hold; raises AdapterUnavailableError in words.

    Slow for large tokenizers: to be called in a thread.
    """
    return AdapterText(_tokenizer(name, files), _template(name, files))


def _tokenizer(name: str, files: Mapping[str, bytes]) -> Tokenizer | None:
    raw = files.get(TOKENIZER_FILE)
    if raw is None:
        return None
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises plain Exception for all that can go wrong
        raise AdapterUnavailableError(
            Reason.REFUSED, f"adapter {name}: its {TOKENIZER_FILE} cannot be read: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _template(name: str, files: Mapping[str, bytes]) -> ChatTemplate | None:
    try:
        return template_of_files(files, f"adapter {name}")
    except (ValueError, RecursionError) as error:
        raise AdapterUnavailableError(
            Reason.REFUSED, f"adapter {name}: its chat template cannot be read: {error}"
        ) from error
