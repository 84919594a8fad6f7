"""Texts that several requests of one call have: tokenized once for all of them."""

from __future__ import annotations

from functools import partial

from cachetools import LRUCache

from lorax_router.service.prompts.encoding import EncodedText, TextToEncode
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool
from lorax_router.service.single_flight import SingleFlight

# Tokens of what is kept, and how many an entry takes beside its own; the least recently used go
# first. All texts that one call may bring fit, unless they are long.
_MAX_TOKENS, _TOKENS_BESIDE = 1 << 18, 64


class SharedTexts:
    """Encodings by the name that requests share, until others need their place.

    Args:
        tokenizer: makes them.
    """

    def __init__(self, tokenizer: TokenizerPool) -> None:
        self._tokenizer = tokenizer
        self._made: LRUCache[tuple[str, TextToEncode], EncodedText] = LRUCache(
            _MAX_TOKENS, _size_of
        )
        self._making: SingleFlight[EncodedText] = SingleFlight()

    async def encode(self, name: str, asked: TextToEncode) -> EncodedText:
        """Return the tokens of texts; raises ValidationError, OverloadedError."""
        made = self._made.get((name, asked))
        if made is not None:
            return made
        # Two kinds of heads may want of one text what is not the same.
        key = f"{name} {asked.cut_to} {asked.with_spans}"
        return await self._making.do(key, partial(self._make, name, asked))

    async def _make(self, name: str, asked: TextToEncode) -> EncodedText:
        made = await self._tokenizer.encode(asked)
        if _size_of(made) <= _MAX_TOKENS:
            self._made[name, asked] = made
        return made


def _size_of(encoded: EncodedText) -> int:
    return _TOKENS_BESIDE + len(encoded.ids)
