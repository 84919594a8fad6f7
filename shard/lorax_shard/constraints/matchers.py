"""Matchers of grammars: compiled once for each pair of tokens and grammar, copied for each row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from cachetools import LRUCache

from lorax_contract.constraint import PARSER_LIMITS, Constraint
from lorax_contract.errors import ValidationError
from lorax_shard.constraints.row import FreshMatcher, words_of
from lorax_shard.constraints.tokens import (
    OwnTokens,
    PieceReader,
    base_tokens,
    own_tokens,
)
from lorax_shard.vocabulary import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer

# What all compiled grammars take, by the estimate below.
_CACHE_BYTES = 256 << 20
# A compiled grammar takes so much more than its text, and at least so much.
_BYTES_PER_CHARACTER = 200
_LEAST_BYTES = 1 << 20
# Adapters' own tokens that are kept; those of a large vocabulary take some 50 MB.
_NUM_OWN = 4


class TokenTables:
    """The tokens of the base and of the adapters that bring some; any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        reader: PieceReader,
        vocab_size: int,
        eos_token_ids: Collection[int],
        read_own: Callable[[Vocabulary], PieceReader],
    ) -> None:
        self._tokenizer = tokenizer
        self._reader = reader
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._read_own = read_own
        self._lock = threading.Lock()
        self._base: LLTokenizer | None = None
        self._vocabulary: Vocabulary | None = None
        self._own: LRUCache[str, LLTokenizer] = LRUCache(_NUM_OWN)

    def get(self, own: OwnTokens | None) -> tuple[str, LLTokenizer]:
        """Return the tokens of an adapter, or of the base, and what names them."""
        if own is None and self._base is not None:
            return "", self._base
        with self._lock:
            if self._base is None:
                self._base = base_tokens(
                    self._tokenizer, self._reader, self._vocab_size, self._eos_token_ids
                )
            if own is None:
                return "", self._base
            key = f"{own.vocabulary.digest} {own.vocab_size} {sorted(own.eos_token_ids)}"
            if key not in self._own:
                self._own[key] = self._made(own, self._base)
            return key, self._own[key]

    def _made(self, own: OwnTokens, base: LLTokenizer) -> LLTokenizer:
        if self._vocabulary is None:
            self._vocabulary = vocabulary_of(self._tokenizer)
        num_shared = own.vocabulary.num_shared(self._vocabulary)
        return own_tokens(own, self._read_own(own.vocabulary), base, self._tokenizer, num_shared)


class Matchers:
    """Makes matchers; any thread.

    Copies of one compiled grammar share what its lexer has found out, and its error, should it
    pass a limit: ``compiled`` makes one that shares nothing.
    """

    def __init__(self, tables: TokenTables) -> None:
        self._tables = tables
        self._lock = threading.Lock()
        self._known: LRUCache[tuple[str, str], tuple[LLMatcher, int]] = LRUCache(
            _CACHE_BYTES, getsizeof=lambda entry: entry[1]
        )

    def of(self, constraint: Constraint, own: OwnTokens | None) -> MatcherSource:
        """Return where the matchers of one constraint come from."""
        return MatcherSource(self, constraint, own)

    def copied(self, constraint: Constraint, own: OwnTokens | None) -> FreshMatcher:
        """Return a matcher at the start of its grammar; raises ValidationError in words."""
        tokens, tokenizer = self._tables.get(own)
        key = (tokens, constraint.key)
        with self._lock:
            if (entry := self._known.get(key)) is not None and not entry[0].is_error():
                return FreshMatcher(entry[0].deep_copy(), tokenizer)
        matcher = _compiled(tokenizer, constraint)
        size = _LEAST_BYTES + _BYTES_PER_CHARACTER * len(constraint.text)
        with self._lock:
            if size <= self._known.maxsize:
                self._known[key] = matcher, size
            return FreshMatcher(matcher.deep_copy(), tokenizer)

    def compiled(self, constraint: Constraint, own: OwnTokens | None) -> FreshMatcher:
        """Return a matcher of its own, and forget what others were copied from."""
        tokens, tokenizer = self._tables.get(own)
        with self._lock:
            self._known.pop((tokens, constraint.key), None)
        return FreshMatcher(_compiled(tokenizer, constraint), tokenizer)

    def warm_up(self) -> None:
        """Read the base's tokens before anybody waits for them; ValidationError if none can."""
        self._tables.get(None)


class MatcherSource(NamedTuple):
    """The matchers of one constraint."""

    matchers: Matchers
    constraint: Constraint
    own: OwnTokens | None

    def copied(self) -> FreshMatcher:
        """Return one that shares with others what its lexer finds out; raises ValidationError."""
        return self.matchers.copied(self.constraint, self.own)

    def compiled(self) -> FreshMatcher:
        """Return one that shares nothing."""
        return self.matchers.compiled(self.constraint, self.own)


def _compiled(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = constraint.grammar
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"the grammar cannot be read: {error}") from error
    # Errors are shown: no part of a grammar or of an output belongs there.
    limits = LLParserLimits(**PARSER_LIMITS, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    # Some show what they take only then.
    first = matcher.deep_copy()
    first.compute_bitmask()
    for each in (matcher, first):
        if each.is_error():
            raise ValidationError(f"the grammar cannot be used: {words_of(each)}")
    return matcher
