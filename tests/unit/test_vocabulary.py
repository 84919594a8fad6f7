"""Tokens as arrays: the tokenizer's own, stored and read again, compared with another's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers import tiny_tokenizers
from tokenizers import Tokenizer

from lorax_shard.vocabulary import (
    VOCABULARY_FILE,
    Vocabulary,
    VocabularyDamagedError,
    read_vocabulary,
    vocabulary_of,
    write_vocabulary,
)

ALL = [
    tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback, tiny_tokenizers.unigram,
    tiny_tokenizers.word_piece, tiny_tokenizers.end_of_word,
]  # fmt: skip


def of(tokens: list[str | None], special: set[int] = frozenset()) -> Vocabulary:
    parts = [b"" if token is None else token.encode() for token in tokens]
    kinds = [0 if t is None else 2 if i in special else 1 for i, t in enumerate(tokens)]
    return Vocabulary(
        starts=np.cumsum([0, *map(len, parts)], dtype=np.int32),
        text=np.frombuffer(b"".join(parts), dtype=np.uint8),
        kinds=np.array(kinds, dtype=np.uint8),
        end_ids=np.array([], dtype=np.int64),
    )


@pytest.mark.parametrize("make", ALL)
def test_tokens_and_which_are_special_are_the_tokenizers(tmp_path: Path, make) -> None:
    tokenizer: Tokenizer = make()
    write_vocabulary(vocabulary_of(tokenizer, tiny_tokenizers.EOS), tmp_path)
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary is not None
    added = tokenizer.get_added_tokens_decoder()
    for token_id in range(-1, tokenizer.get_vocab_size() + 2):
        known = tokenizer.id_to_token(token_id) if token_id >= 0 else None
        assert vocabulary.token(token_id) == known
        # A bool and not an array's: those are many times slower to write to the wire.
        assert vocabulary.is_special(token_id) is (token_id in added and added[token_id].special)
    assert vocabulary.end_ids.tolist() == [tokenizer.token_to_id(tiny_tokenizers.EOS)]


def test_ids_may_be_missing_between_others() -> None:
    own = copy.deepcopy(tiny_tokenizers.word_piece())
    size = own.get_vocab_size()
    document = json.loads(own.to_str())
    document["added_tokens"].append(
        document["added_tokens"][0] | {"id": size + 5, "content": "<far>"}
    )
    document = json.dumps(document)
    vocabulary = vocabulary_of(Tokenizer.from_str(document), "<nowhere>")
    far = [i for i in range(len(vocabulary)) if vocabulary.token(i) == "<far>"]
    assert far and vocabulary.is_special(far[0])
    assert vocabulary.end_ids.tolist() == []


TOKENS = st.lists(st.sampled_from(["", "a", "b", "ab", "ä", None]), max_size=8)


@given(TOKENS, TOKENS, st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)))
def test_what_two_share_is_the_longest_common_beginning(one, other, special, others) -> None:
    same = 0
    for i in range(min(len(one), len(other))):
        if one[i] != other[i] or ((i in special) != (i in others) and one[i] is not None):
            break
        same += 1
    assert of(one, special).num_shared(of(other, others)) == same
    assert of(other, others).num_shared(of(one, special)) == same


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None


@pytest.mark.parametrize("place", [0, 10, -1, -40])
def test_what_was_damaged_is_said(tmp_path: Path, place: int) -> None:
    write_vocabulary(vocabulary_of(tiny_tokenizers.byte_level()), tmp_path)
    path = tmp_path / VOCABULARY_FILE
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(VocabularyDamagedError, match="damaged"):
        read_vocabulary(tmp_path)
