"""Texts of single tokens, as clients are shown them."""

from __future__ import annotations

import pytest
from tests.helpers import tiny_tokenizers

from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.engine.outcome import TokenTexts


@pytest.mark.parametrize("make", [tiny_tokenizers.byte_fallback, tiny_tokenizers.unigram])
def test_tokens_of_prompts_and_alternatives_keep_their_leading_space(make):
    tokenizer = make()
    ids = tokenizer.encode("the fox jumps over the dog", add_special_tokens=False).ids
    texts = TokenTexts(Detokenizer(tokenizer))
    columns = texts.columns(ids, [-1.0] * len(ids))
    assert "".join(columns.texts).endswith(" jumps over the dog")
    assert columns.texts == texts.alternatives(ids, [-1.0] * len(ids)).texts
    # Alone, the tokenizer drops the space that its first token begins with.
    alone = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in ids]
    assert "".join(alone) != "".join(columns.texts)


def test_special_tokens_are_shown_and_marked():
    tokenizer = tiny_tokenizers.byte_level()
    special = [
        token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    ]
    columns = TokenTexts(Detokenizer(tokenizer)).columns([special[0], 5], [-1.0, -2.0])
    assert columns.special == [True, False]
    assert columns.texts[0] == tokenizer.id_to_token(special[0])
