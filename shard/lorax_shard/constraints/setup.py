"""Makes a rank's constraints, where the package for them is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol

from lorax_shard.constraints.matchers import Matchers, TokenTables
from lorax_shard.constraints.rows import ConstrainedRows
from lorax_shard.constraints.tokens import PieceReader
from lorax_shard.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class BaseReader(PieceReader, Protocol):
    """Reads the base's tokens, and by its decoder those of adapters."""

    def with_tokens(self, vocabulary: Vocabulary) -> PieceReader:
        """Return what reads an adapter's own tokens."""


def constraints_maker(
    tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]
) -> Callable[[BaseReader], ConstrainedRows] | None:
    """Return what makes the constraints of the rank that draws; None where they cannot be."""
    # A bare GPU machine measures without it.
    if importlib.util.find_spec("llguidance") is None:
        return None

    def make(reader: BaseReader) -> ConstrainedRows:
        tables = TokenTables(tokenizer, reader, vocab_size, eos_token_ids, reader.with_tokens)
        return ConstrainedRows(Matchers(tables))

    return make
