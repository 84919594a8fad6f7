"""How long a text may be, in characters, before it is given to the tokenizer.

Tokenizing 2 MB takes seconds and hundreds of megabytes, only to find that the prompt is far too
long. A token stands for as many characters as its longest text, so a longer prompt than
``max_input_length`` such tokens can never fit, and is refused unread. That holds where a tokenizer
loses nothing: byte-level and byte-fallback BPE, as nearly all of today's models have it. (Some lack
a few bytes, of control characters for instance, and drop them; who sends hundreds of thousands of
those is refused as well.) One that drops spaces, or makes one unknown token of many characters, has
no such number; for it each token counts as more characters than a text has that people write.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

# Characters that a token of a tokenizer that may lose some counts as.
_LOSSY_CHARS = 256
# The most characters that Unicode's composition makes one of.
_COMPOSED_CHARS = 4
# Bytes of the 256 that a byte-level vocabulary has at least: 243 occur in texts.
_LEAST_BYTES = 200
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
    """Whether each character that the vocabulary has ends up in a token of its own letters."""
    if any(token["lstrip"] or token["rstrip"] for token in document["added_tokens"]):
        # Such a token swallows the spaces beside it.
        return False
    if document["model"]["type"] != "BPE" or not _only_splits(document.get("pre_tokenizer")):
        return False
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if document["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    letters = {char for char in pre_tokenizers.ByteLevel.alphabet() if char in vocabulary}
    is_byte_level = "ByteLevel" in json.dumps(document.get("pre_tokenizer"))
    return is_byte_level and len(letters) >= _LEAST_BYTES and not document["model"].get("fuse_unk")


def _only_splits(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return all(map(_only_splits, pre_tokenizer["pretokenizers"]))
    if kind in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] != "Removed")
    return kind in _SPLITS_ONLY
