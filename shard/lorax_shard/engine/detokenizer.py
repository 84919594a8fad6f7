"""Token ids to text, one token at a time.

A token adds the same bytes to a text wherever it stands after the first token;
only their reading as UTF-8 spans tokens. So the bytes of each token are looked up
once per vocabulary, and a row keeps nothing but the bytes (three at most) of a
character that is not complete yet.

Texts of adapters are made by the base's decoder too, from their own tokens: of an adapter
nothing is executed.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tokenizers import Tokenizer

from lorax_shard.vocabulary import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from cachetools import LRUCache

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# The bytes of an incomplete character lie in this many tokens at the most.
_CONTEXT_TOKENS = 4
# What is kept of the pieces of all adapters together, and what one takes beside its text.
_ADAPTER_PIECES_BYTES = 8 << 20
_PIECE_BYTES = 200


class TokenReader(Protocol):
    """What each token of one vocabulary adds to a text; shared by all rows."""

    @property
    def plain_texts(self) -> Mapping[int, str]:
        """Pieces read so far that are text and nothing else: no special tokens, no bytes.

        One look-up then tells all of nearly every token. That a token is not there says nothing.
        """

    def is_special(self, token_id: int) -> bool:
        """Return whether the token is a special one."""

    def piece(self, token_id: int) -> str | bytes:
        """Return what the token adds after other text; bytes if they are no whole characters.

        Ids that no token has (padding of the model's vocabulary) add "".
        """


class Detokenizer:
    """Implements TokenReader for the base's tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocabulary = vocabulary_of(tokenizer)
        # What is no plain text is kept apart, and beside it ids that no token has.
        self.plain_texts: dict[int, str] = {}
        self._other_pieces: dict[int, str | bytes] = {}
        self._maker = _PieceMaker(tokenizer, self._vocabulary)
        self._numbers = itertools.count()

    def is_special(self, token_id: int) -> bool:
        """Return whether the token is one of the tokenizer's special tokens."""
        return self._vocabulary.is_special(token_id)

    def piece(self, token_id: int) -> str | bytes:
        """Return what the token adds after other text."""
        piece = self.plain_texts.get(token_id)
        return self._other_piece(token_id) if piece is None else piece

    def _other_piece(self, token_id: int) -> str | bytes:
        """Return the piece of a token that is no plain text, or that was not read yet."""
        piece = self._other_pieces.get(token_id)
        if piece is not None:
            return piece
        token = self._vocabulary.token(token_id)
        piece = self._maker.make(token)
        if token is None or isinstance(piece, bytes) or self.is_special(token_id):
            self._other_pieces[token_id] = piece
        else:
            self.plain_texts[token_id] = piece
        return piece

    @cached_property
    def _adapter_pieces(self) -> LRUCache[tuple[int, int], str | bytes]:
        # Here, so that a bare GPU machine, which has no adapters, measures without the package.
        from cachetools import LRUCache

        return LRUCache(_ADAPTER_PIECES_BYTES, getsizeof=lambda each: _PIECE_BYTES + len(each))

    def with_tokens(self, vocabulary: Vocabulary) -> TokenReader:
        """Return what reads an adapter's tokens: as this does those that both have."""
        num_shared = vocabulary.num_shared(self._vocabulary)
        return _AdapterDetokenizer(
            self,
            vocabulary,
            num_shared,
            # Nothing behind the base's tokens is among its plain texts.
            self.plain_texts if num_shared == len(self._vocabulary) else {},
            (next(self._numbers), self._maker, self._adapter_pieces),
        )


class _AdapterDetokenizer:
    """Implements TokenReader for an adapter's own tokens; holds nothing but them."""

    def __init__(
        self,
        base: Detokenizer,
        vocabulary: Vocabulary,
        num_shared: int,
        plain_texts: Mapping[int, str],
        shared: tuple[int, _PieceMaker, LRUCache[tuple[int, int], str | bytes]],
    ) -> None:
        self._base = base
        self._vocabulary = vocabulary
        self._num_shared = num_shared
        self.plain_texts = plain_texts
        self._number, self._maker, self._pieces = shared

    def is_special(self, token_id: int) -> bool:
        """Return whether the token is one of the adapter's special tokens."""
        return self._vocabulary.is_special(token_id)

    def piece(self, token_id: int) -> str | bytes:
        """Return what the token adds after other text."""
        if token_id < self._num_shared:
            return self._base.piece(token_id)
        key = self._number, token_id
        piece = self._pieces.get(key)
        if piece is None:
            piece = self._maker.make(self._vocabulary.token(token_id))
            if _PIECE_BYTES + len(piece) <= _ADAPTER_PIECES_BYTES:
                self._pieces[key] = piece
        return piece


def text_of(reader: TokenReader, token_id: int) -> str:
    """Return the text of a token alone, replacement characters for partial ones."""
    piece = reader.piece(token_id)
    return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")


class _PieceMaker:
    """Reads tokens by one tokenizer's decoder."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        decoders = _decoder_types(tokenizer)
        self._has_byte_level = "ByteLevel" in decoders
        self._has_byte_tokens = "ByteFallback" in decoders
        self._decode: Callable[[list[str]], str] = (
            " ".join if tokenizer.decoder is None else tokenizer.decoder.decode
        )
        self._anchor = self._find_anchor(tokenizer, vocabulary)

    def make(self, token: str | None) -> str | bytes:
        """Return what a token adds to a text."""
        if token is None:
            return ""
        text = self._text_between_anchors(token)
        if _REPLACEMENT not in text:
            return text
        raw = self._token_bytes(token, text)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw

    def _text_between_anchors(self, token: str) -> str:
        """Decode the token between two others, as a decoder may treat both ends differently."""
        if self._anchor is None:
            return self._decode([token])
        anchor = self._anchor
        text = self._decode([anchor.token, token, anchor.token])
        return text[len(anchor.at_start) : len(text) - len(anchor.after)]

    def _token_bytes(self, token: str, text: str) -> bytes:
        """Return the bytes of a token whose decoded text holds replacement characters."""
        if self._has_byte_tokens:
            match = _BYTE_TOKEN.fullmatch(token)
            if match:
                return bytes([int(match[1], 16)])
        if self._has_byte_level:
            alphabet = _byte_alphabet()
            if all(char in alphabet for char in token):
                return bytes(alphabet[char] for char in token)
        return text.encode("utf-8")

    def _find_anchor(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> _Anchor | None:
        """Return some token with a plain text, against which others are read."""
        preferred = tokenizer.encode("a", add_special_tokens=False).ids
        for token_id in itertools.chain(preferred, range(len(vocabulary))):
            token = vocabulary.token(token_id)
            if token is None or vocabulary.is_special(token_id) or _BYTE_TOKEN.fullmatch(token):
                continue  # bytes that follow each other are read together
            at_start, twice = self._decode([token]), self._decode([token, token])
            after = twice[len(at_start) :]
            is_plain = twice.isascii() and at_start.strip() and twice.startswith(at_start)
            if is_plain and after.strip():
                return _Anchor(token, at_start, after)
        return None


class TextPart(NamedTuple):
    """What a pushed token added: text, then (never cut off mid-way) a special token's text."""

    visible: str
    special: str = ""


class TextStream:
    """Reads the tokens of one row as text that continues its prompt."""

    __slots__ = ("_is_of_prompt", "_pending", "_reader")

    def __init__(self, reader: TokenReader, prompt_ids: Sequence[int] = ()) -> None:
        self._reader = reader
        self._pending = b""
        self._is_of_prompt = False
        for token_id in prompt_ids[-_CONTEXT_TOKENS:]:
            self.push(int(token_id))
        # The prompt may end within a character, which the output then completes.
        self._is_of_prompt = bool(self._pending)

    @property
    def is_amid_character(self) -> bool:
        """Whether bytes wait for those that complete their character."""
        return bool(self._pending)

    def push(self, token_id: int) -> TextPart:
        """Return what the token completes; bytes of a partial character wait."""
        piece = self._reader.piece(token_id)
        if self._reader.is_special(token_id):
            return TextPart(self.flush(), text_of(self._reader, token_id))
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


class _Anchor(NamedTuple):
    token: str
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
