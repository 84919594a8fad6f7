"""The matchers of one tokenizer, and a walk through what a grammar allows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tests.helpers import tiny_tokenizers
from tokenizers import Tokenizer

from lorax_contract.constraint import Constraint
from lorax_shard.constraints.matchers import Matchers, TokenTables
from lorax_shard.constraints.row import RowConstraint
from lorax_shard.constraints.tokens import OwnTokens
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.vocabulary import vocabulary_of


class GrammarWorld:
    """The matchers of one tokenizer, and what each of its tokens adds to a text."""

    def __init__(self, tokenizer: Tokenizer, *, padding: int = 0) -> None:
        self.tokenizer = tokenizer
        self.reader = Detokenizer(tokenizer)
        self.size = len(vocabulary_of(tokenizer)) + padding
        self.eos = tokenizer.token_to_id(tiny_tokenizers.EOS)
        self.tables = TokenTables(
            tokenizer, self.reader, self.size, [self.eos], self.reader.with_tokens
        )
        self.matchers = Matchers(self.tables)

    def bytes_of(self, token_id: int) -> bytes:
        piece = self.reader.piece(token_id)
        return piece if isinstance(piece, bytes) else piece.encode()

    def walk(
        self,
        constraint: Constraint,
        choose: Callable[[list[int]], int],
        own: OwnTokens | None = None,
    ) -> list[int]:
        """Return a whole output in which ``choose`` picks among what is allowed."""
        row = RowConstraint(self.matchers.of(constraint, own))
        row.start()
        output: list[int] = []
        while len(output) < 200:
            token_id = choose(allowed(row.mask()))
            output.append(token_id)
            if token_id == self.eos:
                return output
            row.accept(token_id)
            row.fill()
        raise AssertionError("the output has no end")


def allowed(mask) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
