"""Texts that can never fit are known by their length; texts that fit are never refused."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.helpers import tiny_tokenizers
from tests.helpers.http_app import word_tokenizer
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from lorax_router.service.prompts.char_bound import chars_per_token


def byte_level(**parts: object) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tiny_tokenizers.byte_level().to_str())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def byte_level_without(missing: str) -> Tokenizer:
    """As SmolLM2's, which knows no control characters."""
    document = json.loads(tiny_tokenizers.byte_level().to_str())
    spelled = {
        token: place
        for token, place in document["model"]["vocab"].items()
        if token not in {LETTERS[char] for char in missing}
    }
    document["model"]["vocab"] = spelled
    return Tokenizer.from_str(json.dumps(document))


LETTERS = {
    char: pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(char)[0][0]
    for char in "\x01\x02\x7f"
}
EXACT = {
    "byte-level": byte_level(),
    "byte-level behind a split": byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Split(" ", "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    ),
    "byte-level that composes": byte_level(normalizer=normalizers.NFC()),
    "byte-level without some bytes": byte_level_without("\x01\x02\x7f"),
    "byte fallback": tiny_tokenizers.byte_fallback(),
}


@pytest.mark.parametrize("name", EXACT)
@given(
    text=st.text(min_size=1, max_size=60) | st.text("the \n\u0301\u0313\u0345\u03b1", max_size=60)
)
@example(text=unicodedata.normalize("NFD", "\u1f82") * 20)
@example(text="<｜wide｜>" * 9)
@example(text=" " * 60)
def test_no_token_stands_for_more_characters(name: str, text: str) -> None:
    tokenizer = EXACT[name]
    text = "".join(char for char in text if char not in LETTERS)
    assert len(text) <= chars_per_token(tokenizer) * len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("name", EXACT)
def test_the_bound_is_as_narrow_as_the_longest_token(name: str) -> None:
    longest = max(map(len, EXACT[name].get_vocab()))
    factor = 4 if "composes" in name else 1
    assert chars_per_token(EXACT[name]) == longest * factor


def _strips() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


LOSSY = {
    "drops spaces": word_tokenizer(),
    "one unknown token for many characters": tiny_tokenizers.word_piece(),
    "a token that swallows spaces": _strips(),
    "a normalizer that collapses": byte_level(normalizer=normalizers.Replace("aaaa", "a")),
    "a normalizer that removes": byte_level(normalizer=normalizers.StripAccents()),
    "a pre-tokenizer that removes": byte_level(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_tokenizer_that_may_lose_characters_gets_a_wide_bound(name: str) -> None:
    assert chars_per_token(LOSSY[name]) >= 256
