"""Tokens as llguidance has them: the bytes of each, and how a text is cut into them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from lorax_contract.errors import ValidationError
from lorax_shard.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

# Tokens of an adapter that texts are searched for.
_MAX_OWN = 4096


class PieceReader(Protocol):
    """What each token adds to a text."""

    def is_special(self, token_id: int) -> bool:
        """Return whether the token is a special one."""

    def piece(self, token_id: int) -> str | bytes:
        """Return what the token adds after other text."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnTokens:
    """The tokens of an adapter that brings some."""

    vocabulary: Vocabulary
    # Of the head: ids beyond its tokens have no text.
    vocab_size: int
    eos_token_ids: frozenset[int]


def base_tokens(
    tokenizer: Tokenizer, reader: PieceReader, vocab_size: int, eos_token_ids: Collection[int]
) -> LLTokenizer:
    """Return the base's tokens; raises ValidationError for a model that cannot end a text."""
    from llguidance import LLTokenizer

    ends = _ends(eos_token_ids, vocab_size)
    num_ids = max(vocab_size, len(tokenizer.get_vocab(with_added_tokens=True)))
    try:
        return LLTokenizer(tokenizer.to_str(), n_vocab=num_ids, eos_token=ends)
    except Exception as error:  # noqa: BLE001 - the library reads only the usual decoders
        logger.info("the tokenizer's tokens are read one by one: %s", error)
    pieces = [_bytes_of(reader, token_id) for token_id in range(vocab_size)]
    special = [token_id for token_id in range(vocab_size) if reader.is_special(token_id)]
    return _made(pieces, special, ends, tokenizer, vocab_size)


def own_tokens(
    own: OwnTokens, reader: PieceReader, base: LLTokenizer, base_tokenizer: Tokenizer,
    num_shared: int,
) -> LLTokenizer:  # fmt: skip
    """Return an adapter's tokens, of which the base has those below ``num_shared`` too.

    Their texts are read by the base's decoder: nothing of the adapter's is run.
    """
    ids = range(own.vocab_size)
    pieces = [
        base.decode_bytes([token_id]) if token_id < num_shared else _bytes_of(reader, token_id)
        for token_id in ids
    ]
    special = [token_id for token_id in ids if reader.is_special(token_id)]
    ends = _ends(own.eos_token_ids, own.vocab_size)
    return _made(pieces, special, ends, base_tokenizer, num_shared)


def _ends(eos_token_ids: Collection[int], vocab_size: int) -> list[int]:
    ends = sorted(token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size)
    if not ends:
        raise ValidationError(
            "this model has no token that ends a text, so its output cannot be bound to a grammar"
        )
    return ends


def _bytes_of(reader: PieceReader, token_id: int) -> bytes:
    piece = reader.piece(token_id)
    return piece if isinstance(piece, bytes) else piece.encode("utf-8", "replace")


def _made(
    pieces: list[bytes], special: Sequence[int], ends: list[int], tokenizer: Tokenizer,
    num_usable: int,
) -> LLTokenizer:  # fmt: skip
    from llguidance import LLTokenizer

    cutter = _Cutter(pieces, special, ends, tokenizer, num_usable)
    tokens: Any = _Tokens(pieces, special, ends, cutter)
    return LLTokenizer(tokens, eos_token=ends)


class _Tokens:
    """Has what llguidance asks of a tokenizer that it does not read itself."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special: Sequence[int], ends: list[int],
        cut: Callable[[str], list[int]],
    ) -> None:  # fmt: skip
        self.tokens = tokens
        self.special_token_ids = list(special)
        self.eos_token_id = ends[0]
        self._cut = cut

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text that a grammar leaves no choice of."""
        return self._cut(text)


class _Cutter:
    """Cuts a text into tokens: an adapter's own ones first, the rest as the base's tokenizer does.

    Where that does not give back the text, the longest tokens come first.
    """

    def __init__(
        self, pieces: list[bytes], special: Sequence[int], ends: list[int], tokenizer: Tokenizer,
        num_usable: int,
    ) -> None:  # fmt: skip
        self._pieces, self._special, self._ends = pieces, special, ends
        self._tokenizer = tokenizer
        self._num_usable = num_usable

    def __call__(self, text: str) -> list[int]:
        """Return ids whose pieces are the text."""
        parts = [text] if self._own_pattern is None else self._own_pattern.split(text)
        ids = [token_id for part in parts if part for token_id in self._cut(part)]
        if b"".join(self._pieces[token_id] for token_id in ids) == text.encode():
            return ids
        return self._longest_first.greedy_tokenize(text)

    def _cut(self, part: str) -> list[int]:
        """Return the ids of a text between own tokens, or of one; none if they are unknown."""
        if (own := self._own.get(part)) is not None:
            return [own]
        ids: list[int] = self._tokenizer.encode(part, add_special_tokens=False).ids
        return ids if max(ids, default=0) < self._num_usable else []

    @cached_property
    def _own(self) -> dict[str, int]:
        special = set(self._special)
        own = range(self._num_usable, len(self._pieces))
        texts = {
            self._pieces[token_id].decode("utf-8", "ignore"): token_id
            for token_id in own
            if token_id not in special
        }
        # Of many, the base's tokenizer knows too little to cut anything by.
        return texts if len(texts) <= _MAX_OWN else {}

    @cached_property
    def _own_pattern(self) -> re.Pattern[str] | None:
        texts = sorted(filter(None, self._own), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None

    @cached_property
    def _longest_first(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        tokens: Any = _Tokens(self._pieces, self._special, self._ends, lambda text: [])
        return LLTokenizer(tokens, eos_token=self._ends, slices=[])
