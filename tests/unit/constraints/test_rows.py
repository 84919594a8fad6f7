"""Constrained rows, advanced beside the steps."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from tests.helpers import tiny_tokenizers
from tests.helpers.constraints import choice, regex
from tests.helpers.grammar_world import GrammarWorld, allowed

from lorax_contract.errors import ValidationError
from lorax_shard.constraints import matchers
from lorax_shard.constraints.rows import ConstrainedRows
from lorax_shard.constraints.tokens import OwnTokens
from lorax_shard.vocabulary import vocabulary_of

GRAMMARS = [regex("[a-e]{9}"), choice("the quick brown fox"), regex("[a-e]{9}"), regex("(dog )+")]


def walked(rows: ConstrainedRows, own: list[OwnTokens | None]) -> list[list[int]]:
    """Return the first tokens of a row for each grammar, which advance together."""
    members = [
        rows.enter(constraint, tokens) for constraint, tokens in zip(GRAMMARS, own, strict=True)
    ]
    ids: list[list[int]] = [[] for _ in members]
    for _ in range(3):
        drawn = [allowed(member.mask())[-1] for member in members]
        for known, token_id in zip(ids, drawn, strict=True):
            known.append(token_id)
        rows.advance(members, lambda ids=drawn: ids)
    return ids


def test_several_threads_fill_the_masks_that_one_fills():
    world = GrammarWorld(tiny_tokenizers.byte_level())
    vocabulary = vocabulary_of(world.tokenizer)
    wide = OwnTokens(vocabulary, len(vocabulary) + 100, frozenset({world.eos}))
    own = [None, wide, None, wide]
    found = []
    for num_threads in (1, 3):
        rows = ConstrainedRows(world.matchers, num_threads)
        found.append(walked(rows, own))
        rows.close()
    assert found[0] == found[1]


def test_w33_a_grammar_that_takes_long_holds_up_nobody(monkeypatch):
    """LoRAX compiles a schema in the loop that runs all steps."""
    world = GrammarWorld(tiny_tokenizers.byte_level())
    rows = ConstrainedRows(world.matchers)
    slow, real, go_on, begun = (
        regex("slow"),
        matchers._compiled,
        threading.Event(),
        threading.Event(),
    )

    def compiled(tokens, constraint):
        if constraint == slow:
            begun.set()
            assert go_on.wait(60)
        return real(tokens, constraint)

    monkeypatch.setattr(matchers, "_compiled", compiled)
    preparing = threading.Thread(target=rows.prepare, args=(slow,))
    preparing.start()
    assert begun.wait(60)
    assert all(len(ids) == 3 for ids in walked(rows, [None] * 4))
    assert preparing.is_alive()
    go_on.set()
    preparing.join()
    rows.close()


def test_what_fails_beside_a_step_is_told_to_its_row():
    world = GrammarWorld(tiny_tokenizers.byte_level())
    rows = ConstrainedRows(world.matchers)
    bad, good = rows.enter(regex("(")), rows.enter(regex("a"))
    with pytest.raises(ValidationError, match="cannot be used"):
        bad.mask()
    assert np.any(good.mask())
    rows.close()
