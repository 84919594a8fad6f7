"""An adapter's own tokenizer: read where adapters are verified, and compared with the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.vocabulary import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
# What tokens and texts are made by, beside the tokens themselves: what a foreign one does is not
# bounded.
_RULES = {"normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer", "decoder": "decoder"}
# Lengths are the server's affair.
_OF_TRAINING = ("version", "truncation", "padding")
# A tokenizer without tokens.
_BARE: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "post_processor": None,
    "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
}


def read_tokenizer(folder: Path, base: Path | None) -> Vocabulary | None:
    """Return the tokens of an adapter's own tokenizer; None if it brings none.

    ``base`` is the base's tokenizer.json. Raises AdapterRefusedError if its own differs in more
    than its tokens.
    """
    path = folder / _TOKENIZER_FILE
    if not path.is_file():
        return None
    own = path.read_bytes()
    try:
        if base is not None and (wanted := base.read_bytes()) != own:
            # First: a tokenizer's normalizer is applied to its added tokens as it is read.
            _require_same_rules(_rules_of(own), _rules_of(wanted))
        return vocabulary_of(_tokenizer(own), _end_token(folder))
    except AdapterRefusedError:
        raise
    except Exception as error:  # the library raises plain Exception for all that can go wrong
        raise AdapterRefusedError(f"its {_TOKENIZER_FILE} cannot be read: {error}") from error


def _tokenizer(document: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_buffer(document)


def _rules_of(document: bytes) -> dict[str, Any]:
    """Return the rules of a tokenizer as the library understands them, older spellings too."""
    rules = {name: json.loads(document).get(name) for name in _RULES}
    bare = _tokenizer(json.dumps(_BARE | rules).encode())
    parts = {name: getattr(bare, name) for name in _RULES}
    return {
        name: part and _effective(json.loads(part.__getstate__()), name)
        for name, part in parts.items()
    }


def _effective(rule: Any, name: str) -> Any:
    """Return a rule without what changes no text and no token."""
    if isinstance(rule, list):
        return [_effective(each, name) for each in rule]
    if not isinstance(rule, dict):
        return rule
    if name == "decoder" and rule.get("type") == "ByteLevel":
        return {"type": "ByteLevel"}
    # Where in the text a token lies; it is the same token.
    return {key: _effective(each, name) for key, each in rule.items() if key != "trim_offsets"}


def is_bases(folder: Path, base: Path | None) -> bool:
    """Tell whether an adapter's tokenizer.json is the base's, saved anew by whatever release."""
    path = folder / _TOKENIZER_FILE
    if base is None or not path.is_file():
        return False
    own, wanted = path.read_bytes(), base.read_bytes()
    return own == wanted or _plain(json.loads(own)) == _plain(json.loads(wanted))


def _plain(document: Any) -> Any:
    """Return a tokenizer's document without what its training left, and in one spelling."""
    if not isinstance(document, dict):
        return document
    plain = {key: each for key, each in document.items() if key not in _OF_TRAINING}
    model = plain.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        pairs = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
        plain["model"] = {**model, "merges": pairs}
    return plain


def _require_same_rules(own: dict[str, Any], base: dict[str, Any]) -> None:
    for name, words in _RULES.items():
        if own[name] != base[name]:
            raise AdapterRefusedError(
                f"its tokenizer has another {words} than the base model's; an adapter's tokenizer "
                "may differ in its tokens only"
            )


def _end_token(folder: Path) -> str | None:
    """Return the token that the tokenizer's configuration calls the end of a text."""
    try:
        document = json.loads((folder / _CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    token = document.get("eos_token") if isinstance(document, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
