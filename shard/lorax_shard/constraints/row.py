"""The constraint of one resident row: which tokens may come next."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from lorax_contract.errors import GenerationError
from lorax_shard.sampling.masks import Mask

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_NOTE = "\n<non-verbose/>"


class FreshMatcher(NamedTuple):
    """A matcher at the start of its grammar, and the tokens that it knows."""

    matcher: LLMatcher
    tokens: LLTokenizer


class MakesMatchers(Protocol):
    """Where the matchers of one constraint come from."""

    def copied(self) -> FreshMatcher:
        """Return one that shares with others what its lexer finds out; raises ValidationError."""

    def compiled(self) -> FreshMatcher:
        """Return one that shares nothing."""


class RowConstraint:
    """Knows the next mask of a row, or will.

    All but ``mask`` belongs to the threads beside the steps, where one job at a time has the
    row: the one that ``pending`` stands for.

    Args:
        source: makes its matcher.
        past_ids: output of an earlier residence.
        num_endless: how many tokens come first before the output may end where it need not.
    """

    __slots__ = (
        "_error", "_fresh", "_ids", "_is_alone", "_num_endless", "_source", "_words", "pending",
    )  # fmt: skip

    def __init__(
        self, source: MakesMatchers, past_ids: Iterable[int] = (), num_endless: float = 0
    ) -> None:
        self._source = source
        self._ids = [int(token_id) for token_id in past_ids]
        self._num_endless = num_endless
        self._is_alone = False
        self._fresh: FreshMatcher | None = None
        self._words: Mask | None = None
        self._error: Exception | None = None
        self.pending: Future[None] | None = None

    def mask(self) -> Mask:
        """Return which tokens may come next, once that is known; raises what is wrong in words."""
        if self.pending is not None:
            self.pending.result()
        if self._error is not None:
            raise self._error
        assert self._words is not None, "nobody fills the masks of this row"
        return self._words

    @property
    def matcher(self) -> LLMatcher:
        """At the end of the output; it was started before."""
        assert self._fresh is not None
        return self._fresh.matcher

    @property
    def num_words(self) -> int:
        """Words in its masks."""
        assert self._fresh is not None
        return -(-self._fresh.tokens.vocab_size // 32)

    def start(self) -> None:
        """Make the matcher, bring it to the end of the output and fill the first mask."""
        self._fresh = self._source.copied()
        self.matcher.consume_tokens(self._ids)
        self.fill()

    def accept(self, token_id: int) -> None:
        """Go on to the token that was drawn."""
        self._ids.append(token_id)
        self.matcher.consume_token(token_id)

    def fill(self) -> None:
        """Fill and take the next mask."""
        words = np.empty(self.num_words, dtype=np.int32)
        self._fill(words)
        self.take(words)

    def take(self, words: Mask) -> None:
        """Take the mask that the matcher filled last."""
        if self.matcher.is_error() and not self._is_alone:
            # It may be the fault of another row, with which this one shares a lexer.
            self._fresh, self._is_alone = self._source.compiled(), True
            self.matcher.consume_tokens(self._ids)
            self._fill(words)
        if self.matcher.is_error():
            self._error = GenerationError(
                "the output cannot be kept to its grammar any further: " + words_of(self.matcher)
            )
        elif len(self._ids) < self._num_endless:
            words = self._without_end(words)
        self._words = words

    def _fill(self, words: Mask) -> None:
        self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def _without_end(self, words: Mask) -> Mask:
        """Return a mask without the tokens that end a text, if there are others."""
        assert self._fresh is not None
        endless = words.copy()
        for token_id in self._fresh.tokens.eos_tokens:
            endless[token_id // 32] &= ~np.int32(np.uint32(1 << (token_id % 32)).view(np.int32))
        return endless if endless.any() else words


def words_of(matcher: LLMatcher) -> str:
    """Return what is wrong with a matcher."""
    return matcher.get_error().removesuffix(_NOTE).strip()
