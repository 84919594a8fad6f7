"""Texts and pairs of texts as tokens: whole, and cut as the library itself cuts them."""

from __future__ import annotations

import itertools

import pytest
from tests.helpers.http_app import word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lorax_router.service.prompts.encoding import TextToEncode, encode


def pair_tokenizer(*, has_types: bool = True) -> Tokenizer:
    """`<s> A > B >`, where B's tokens, and the one behind it, are of type 1, or of none."""
    tokenizer = word_tokenizer()
    kind = 1 if has_types else 0
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A >",
        pair=f"<s> $A > $B:{kind} >:{kind}",
        special_tokens=[("<s>", 900), (">", 903)],
    )
    return tokenizer


def words(start: int, num: int) -> str:
    return " ".join(f"w{start + place}" for place in range(num))


def test_the_second_of_two_texts_begins_where_its_type_does() -> None:
    asked = TextToEncode("w1 w2", "w3")
    assert encode(pair_tokenizer(), asked) == ([900, 1, 2, 903, 3, 903], 4, None)
    assert encode(pair_tokenizer(has_types=False), asked) == ([900, 1, 2, 903, 3, 903], 0, None)
    assert encode(pair_tokenizer(), TextToEncode("w1 w2")) == ([900, 1, 2, 903], 0, None)


@pytest.mark.parametrize("most", [3, 4, 5, 8, 20])
def test_what_is_too_long_is_cut_at_its_end_and_keeps_what_goes_around_it(most: int) -> None:
    tokenizer, library = pair_tokenizer(), pair_tokenizer()
    library.enable_truncation(most)
    for num in (1, 2, 3, 10):
        text = words(0, num)
        found = encode(tokenizer, TextToEncode(text, cut_to=most))
        assert found == (library.encode(text).ids, 0, None)
        assert len(found.ids) <= most


@pytest.mark.parametrize("most", [5, 6, 7, 8, 9, 20])
def test_of_two_texts_the_longer_one_is_cut_first(most: int) -> None:
    tokenizer, library = pair_tokenizer(), pair_tokenizer()
    library.enable_truncation(most, strategy="longest_first")
    for first, second in itertools.product((1, 2, 3, 4, 7), repeat=2):
        texts = words(0, first), words(100, second)
        expected = library.encode(*texts)
        found = encode(tokenizer, TextToEncode(*texts, cut_to=most))
        assert found.ids == expected.ids, (first, second)
        assert found.second_start == expected.type_ids.index(1)


def test_nothing_is_added_where_nothing_is_to_be() -> None:
    asked = TextToEncode("w1 w2 w3", add_special_tokens=False, cut_to=2)
    assert encode(pair_tokenizer(), asked) == ([1, 2], 0, None)


@pytest.mark.parametrize("most", [None, 4])
def test_tokens_tell_where_they_stand_in_the_text(most: int | None) -> None:
    asked = TextToEncode("w1  ü w2", cut_to=most, with_spans=True)
    spans = [(0, 0), (0, 2), (4, 5), (6, 8), (0, 0)]
    if most is not None:
        spans = [*spans[: most - 1], (0, 0)]
    assert encode(pair_tokenizer(), asked).spans == spans


def test_places_are_right_where_a_tokenizer_takes_spaces_from_them() -> None:
    vocabulary = {"<s>": 0, ">": 1, "ab": 2, "\u0120ab": 3, "[UNK]": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing((">", 1), ("<s>", 0))
    whole = encode(tokenizer, TextToEncode("ab ab ab", with_spans=True))
    cut = encode(tokenizer, TextToEncode("ab ab ab", cut_to=4, with_spans=True))
    assert whole == ([0, 2, 3, 3, 1], 0, [(0, 0), (0, 2), (3, 5), (6, 8), (0, 0)])
    assert cut == ([0, 2, 3, 1], 0, [(0, 0), (0, 2), (3, 5), (0, 0)])
