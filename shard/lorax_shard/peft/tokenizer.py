"""An adapter's own tokenizer: read where adapters are verified, and compared with the base's.

It may have other tokens. How texts are cut and put together is the base's: what another
normalizer or decoder makes of a text is not bounded, and a few lines of JSON are enough to
make a billion letters of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_shard.adapter_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from lorax_shard.peft.errors import AdapterRefusedError, plain, shorten
from lorax_shard.vocabulary import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_RULES = {
    "normalizer": "normalizer",
    "pre_tokenizer": "pre-tokenizer",
    "post_processor": "post-processor",
    "decoder": "decoder",
}
# A tokenizer without tokens.
_BARE: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
}
# What a model's option means where a file, of an older release perhaps, does not say.
_MODEL_OPTIONS: dict[str, Any] = {
    "type": None, "dropout": None, "unk_token": None, "unk_id": None,
    "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
    "byte_fallback": False, "ignore_merges": False, "max_input_chars_per_word": 100,
}  # fmt: skip
# Of these "" means none.
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
# Beyond the base's own: the longest token, added tokens, their characters together.
_MAX_TOKEN_CHARS = 1024
_MAX_ADDED = 1 << 15
_MAX_ADDED_CHARS = 1 << 20

_Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AdapterTokenizer:
    """What an adapter's own tokenizer comes to."""

    vocabulary: Vocabulary
    # Whether it reads every text as the base's does.
    is_base: bool


def read_tokenizer(folder: Path, base: Path | None, num_rows: int = 0) -> AdapterTokenizer | None:
    """Return an adapter's own tokenizer; None if it brings none.

    ``base`` is the base's tokenizer.json, ``num_rows`` how many tokens the model has with this
    adapter, 0 if that is not known. Raises AdapterRefusedError if its own differs in more than
    its tokens, or has more or longer ones than are read.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    raw = path.read_bytes()
    try:
        own = _parsed(raw)
        is_base = False
        if base is not None:
            # First: a tokenizer's normalizer is applied to its added tokens as it is read.
            wanted = _parsed(base.read_bytes())
            require_same_rules(own, wanted)
            is_base = _tokens_of(own) == _tokens_of(wanted)
        if not is_base:
            require_bounded(own, num_rows)
        vocabulary = vocabulary_of(_tokenizer(raw), _end_token(folder))
    except (AdapterRefusedError, MemoryError):
        raise
    except BaseException as error:
        words = plain(str(error))
        raise AdapterRefusedError(f"its {TOKENIZER_FILE} cannot be read: {words}") from error
    return AdapterTokenizer(vocabulary, is_base)


def require_same_rules(own: _Document, base: _Document) -> None:
    """Refuse a tokenizer.json that does more with a text than another one, by name."""
    own_rules, base_rules = _rules_of(own), _rules_of(base)
    differing = [words for name, words in _RULES.items() if own_rules[name] != base_rules[name]]
    if differing:
        raise _otherwise(f"another {differing[0]}")
    own_options, base_options = _options_of(own["model"]), _options_of(base["model"])
    for name, value in own_options.items():
        if value != base_options.get(name):
            raise _otherwise(f"`model.{plain(name)}` {shorten(value)}")


def _otherwise(what: str) -> AdapterRefusedError:
    return AdapterRefusedError(
        f"its tokenizer.json has {what}, unlike the base model's; an adapter's tokenizer may differ "
        "in its tokens only: save the adapter without its tokenizer to use the base model's"
    )


def require_bounded(document: _Document, num_rows: int) -> None:
    """Refuse a tokenizer.json with too many or too long tokens."""
    added = document.get("added_tokens") or []
    if len(added) > _MAX_ADDED or sum(len(each["content"]) for each in added) > _MAX_ADDED_CHARS:
        raise AdapterRefusedError(
            f"its {TOKENIZER_FILE} adds {len(added)} tokens; the limit is {_MAX_ADDED}, "
            f"of {_MAX_ADDED_CHARS} characters together"
        )
    ids = [*_ids_of(document["model"]["vocab"])]
    ids += [(each["content"], each["id"]) for each in added]
    longest = max((token for token, _ in ids), key=len, default="")
    if len(longest) > _MAX_TOKEN_CHARS:
        raise AdapterRefusedError(
            f"its {TOKENIZER_FILE} has a token of {len(longest)} characters, {shorten(longest)}; "
            f"the limit is {_MAX_TOKEN_CHARS}"
        )
    # Some more than the model computes are common: a padding token that nobody trained.
    most = max(num_rows, len(dict(ids))) + _MAX_ADDED
    # Of a token that is there twice the library may take either.
    highest = max((token_id for _, token_id in ids), default=0)
    if highest >= most:
        raise AdapterRefusedError(
            f"its {TOKENIZER_FILE} has a token with the id {highest}, far beyond the tokens that "
            "there are"
        )


def _ids_of(vocabulary: Any) -> Iterable[tuple[str, int]]:
    """Most kinds map tokens to ids; unigram models list tokens in the order of their ids."""
    if isinstance(vocabulary, Mapping):
        return vocabulary.items()
    return ((token, token_id) for token_id, (token, _) in enumerate(vocabulary))


def _parsed(raw: bytes) -> _Document:
    document = json.loads(raw)
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError("it is no tokenizer")
    return document


def _tokenizer(raw: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_buffer(raw)


def _rules_of(document: _Document) -> dict[str, Any]:
    """Return the rules of a tokenizer as the library understands them, older spellings too."""
    rules = {name: document.get(name) for name in _RULES}
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
    if name == "post_processor" and rule.get("type") in ("ByteLevel", "Sequence"):
        return _effective_steps(rule)
    # Where in the text a token lies; it is the same token.
    return {key: _effective(each, name) for key, each in rule.items() if key != "trim_offsets"}


def _effective_steps(rule: _Document) -> Any:
    """Return a post-processor without steps that add no token; None if there is no other."""
    steps = [_effective(each, "post_processor") for each in rule.get("processors", ())]
    steps = [each for each in steps if each is not None]
    return {"type": "Sequence", "processors": steps} if len(steps) > 1 else next(iter(steps), None)


def _options_of(model: _Document) -> dict[str, Any]:
    """Return what a model is told beside its tokens; a name that is not known stays."""
    options = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    options |= {name: options.get(name) or None for name in _AFFIXES}
    return {**_MODEL_OPTIONS, **options}


def _tokens_of(document: _Document) -> tuple[Any, ...]:
    """Return the tokens of a tokenizer and how they are joined, to compare."""
    model = document["model"]
    merges = [
        tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each)
        for each in model.get("merges") or []
    ]
    added = sorted(document.get("added_tokens") or [], key=lambda each: int(each["id"]))
    return model["vocab"], merges, added


def _end_token(folder: Path) -> str | None:
    """Return the token that the tokenizer's configuration calls the end of a text."""
    try:
        document = json.loads((folder / TOKENIZER_CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    token = document.get("eos_token") if isinstance(document, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
