"""How long a text may be, in characters, before it is given to the tokenizer.

Tokenizing 2 MB takes seconds and hundreds of megabytes, only to find that the prompt is far too
long. A token stands for as many characters as its longest text, so a longer prompt than
``max_input_length`` such tokens can never fit, and is refused unread. That holds where a tokenizer
loses nothing: byte-level and byte-fallback BPE, as nearly all of today's models have it. One that
drops characters, or makes one unknown token of many, has no such number; for it each token counts
as more characters than a text has that people write.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

# Characters that a token of a tokenizer that may lose some counts as.
_LOSSY_CHARS = 256
# The most characters that Unicode's composition makes one of.
_COMPOSED_CHARS = 4
_SPLITS_ONLY = ("ByteLevel", "Digits", "Metaspace", "UnicodeScripts")


def chars_per_token(tokenizer: Tokenizer) -> int:
    """Return how many characters of a text one token stands for at most."""
    longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
    document = json.loads(tokenizer.to_str())
    factor = _shrinks_by(document.get("normalizer"))
    if factor is None or not _keeps_all(document, tokenizer):
        return max(longest, _LOSSY_CHARS)
    return longest * factor


def _shrinks_by(normalizer: dict[str, Any] | None) -> int | None:
    """How many characters a normalizer makes one of at most; None if there is no bound."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        factor = 1
        for each in normalizer["normalizers"]:
            inner = _shrinks_by(each)
            if inner is None:
                return None
            factor *= inner
        return factor
    if kind == "Replace":
        pattern = normalizer["pattern"].get("String")
        is_kept = pattern is not None and len(normalizer["content"]) >= len(pattern)
        return 1 if is_kept else None
    return {"Prepend": 1, "NFD": 1, "NFC": _COMPOSED_CHARS}.get(kind)


def _keeps_all(document: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether each character ends up in a token, and none that is unknown."""
    if any(token["lstrip"] or token["rstrip"] for token in document["added_tokens"]):
        # Such a token swallows the spaces beside it.
        return False
    if document["model"]["type"] != "BPE" or not _only_splits(document.get("pre_tokenizer")):
        return False
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if document["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return "ByteLevel" in json.dumps(document.get("pre_tokenizer")) and all(
        char in vocabulary for char in pre_tokenizers.ByteLevel.alphabet()
    )


def _only_splits(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return all(map(_only_splits, pre_tokenizer["pretokenizers"]))
    if kind in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] != "Removed")
    return kind in _SPLITS_ONLY
