"""Token ids to text, one token at a time.

A token adds the same bytes to a text wherever it stands after the first token;
only their reading as UTF-8 spans tokens. So the bytes of each token are looked up
once per vocabulary, and a row keeps nothing but the bytes (three at most) of a
character that is not complete yet.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# The bytes of an incomplete character lie in this many tokens at the most.
_CONTEXT_TOKENS = 4


class Detokenizer:
    """What each token of one tokenizer adds to a text; shared by all rows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoders = _decoder_types(tokenizer)
        self._has_byte_level = "ByteLevel" in decoders
        self._has_byte_tokens = "ByteFallback" in decoders
        self._special_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self._pieces: dict[int, str | bytes] = {}
        self._anchor = self._find_anchor()

    def is_special(self, token_id: int) -> bool:
        """Return whether the token is one of the tokenizer's special tokens."""
        return token_id in self._special_ids

    def piece(self, token_id: int) -> str | bytes:
        """Return what the token adds after other text; bytes if they are no whole characters.

        Ids that the tokenizer does not have (padding of the model's vocabulary) add "".
        """
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def text(self, token_id: int) -> str:
        """Return the text of the token alone, replacement characters for partial ones."""
        piece = self.piece(token_id)
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")

    def _make_piece(self, token_id: int) -> str | bytes:
        text = self._text_between_anchors(token_id)
        if _REPLACEMENT not in text:
            return text
        raw = self._token_bytes(self._tokenizer.id_to_token(token_id), text)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw

    def _text_between_anchors(self, token_id: int) -> str:
        """Decode the token between two others, as a decoder may treat both ends differently."""
        if self._anchor is None:
            return self._decode([token_id])
        anchor = self._anchor
        text = self._decode([anchor.token_id, token_id, anchor.token_id])
        return text[len(anchor.at_start) : len(text) - len(anchor.after)]

    def _token_bytes(self, token: str | None, text: str) -> bytes:
        """Return the bytes of a token whose decoded text holds replacement characters."""
        if token is not None and self._has_byte_tokens:
            match = _BYTE_TOKEN.fullmatch(token)
            if match:
                return bytes([int(match[1], 16)])
        if token is not None and self._has_byte_level:
            alphabet = _byte_alphabet()
            if all(char in alphabet for char in token):
                return bytes(alphabet[char] for char in token)
        return text.encode("utf-8")

    def _find_anchor(self) -> _Anchor | None:
        """Return some token with a plain text, against which others are read."""
        preferred = self._tokenizer.encode("a", add_special_tokens=False).ids
        for token_id in [*preferred, *range(self._tokenizer.get_vocab_size())]:
            at_start, twice = self._decode([token_id]), self._decode([token_id, token_id])
            after = twice[len(at_start) :]
            is_plain = twice.isascii() and at_start.strip() and twice.startswith(at_start)
            if is_plain and after.strip() and token_id not in self._special_ids:
                return _Anchor(token_id, at_start, after)
        return None

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


class TextPart(NamedTuple):
    """What a pushed token added: text, then (never cut off mid-way) a special token's text."""

    visible: str
    special: str = ""


class TextStream:
    """Reads the tokens of one row as text that continues its prompt."""

    __slots__ = ("_detokenizer", "_is_of_prompt", "_pending")

    def __init__(self, detokenizer: Detokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._detokenizer = detokenizer
        self._pending = b""
        self._is_of_prompt = False
        for token_id in prompt_ids[-_CONTEXT_TOKENS:]:
            self.push(int(token_id))
        # The prompt may end within a character, which the output then completes.
        self._is_of_prompt = bool(self._pending)

    def push(self, token_id: int) -> TextPart:
        """Return what the token completes; bytes of a partial character wait."""
        piece = self._detokenizer.piece(token_id)
        if self._detokenizer.is_special(token_id):
            return TextPart(self.flush(), self._detokenizer.text(token_id))
        if isinstance(piece, str):
            if not self._pending:
                return TextPart(piece)
            piece = piece.encode("utf-8")
        return TextPart(self._read(piece, final=False))

    def flush(self) -> str:
        """Return a replacement character for a partial character that will not be completed."""
        return self._read(b"", final=True) if self._pending else ""

    def _read(self, raw: bytes, *, final: bool) -> str:
        data = self._pending + raw
        text, num_read = codecs.utf_8_decode(data, "replace", final)
        self._pending = data[num_read:]
        if self._is_of_prompt and num_read:
            # Bytes that the prompt left open and nothing completed are no output.
            self._is_of_prompt = False
            text = text.removeprefix(_REPLACEMENT)
        return text


@lru_cache(maxsize=8)
def detokenizer_of(tokenizer: Tokenizer) -> Detokenizer:
    """Return the tokenizer's Detokenizer, the same one each time (compared by identity)."""
    return Detokenizer(tokenizer)


class _Anchor(NamedTuple):
    token_id: int
    at_start: str  # its text as the first token
    after: str  # its text after another token


def _decoder_types(tokenizer: Tokenizer) -> set[str]:
    """Return the type names of the tokenizer's decoder and of its parts."""
    if tokenizer.decoder is None:
        return set()
    found: set[str] = set()
    to_visit = [json.loads(tokenizer.decoder.__getstate__())]
    while to_visit:
        node = to_visit.pop()
        found.add(str(node.get("type")))
        to_visit.extend(node.get("decoders", []))
    return found


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Return the byte behind each character of byte-level vocabularies.

    Printable bytes of Latin-1 stand for themselves; the others, in order, are
    the characters from U+0100 up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet
