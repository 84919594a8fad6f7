"""Incremental text against the tokenizer's own decoding of all ids at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers import tiny_tokenizers
from tokenizers import Tokenizer

from lorax_shard.engine.detokenizer import Detokenizer, TextStream, detokenizer_of

REPLACEMENT = "\ufffd"
# Tokenizers that can write any text, and ones that know their corpus only.
ANY_TEXT = [tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback]
OWN_TEXT = [tiny_tokenizers.unigram, tiny_tokenizers.word_piece, tiny_tokenizers.end_of_word]

ALPHABET = st.one_of(
    st.sampled_from("aehot  \n\t.,"),
    st.sampled_from("🙂🚀👩‍👧🇫🇷é\u0301\u0300你好世界ñß€Ω"),
    st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT),
)
TEXTS = st.text(ALPHABET, max_size=30)


def stream_text(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> str:
    stream = TextStream(detokenizer_of(tokenizer), prompt_ids)
    return "".join("".join(stream.push(token_id)) for token_id in ids) + stream.flush()


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def reference(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode all ids at once, giving up no more than the bytes that are wrong.

    For byte tokens the tokenizer itself gives up a whole run of them for one bad byte.
    """
    if tokenizer is not tiny_tokenizers.byte_fallback():
        return decode(tokenizer, ids)
    raw = b""
    for token_id in ids:
        token = tokenizer.id_to_token(token_id) or ""
        is_byte = token.startswith("<0x")
        raw += bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()
    return raw.decode("utf-8", "replace").removeprefix(" ")


@pytest.mark.parametrize("make", ANY_TEXT)
@given(text=TEXTS, data=st.data())
def test_any_text_split_anywhere_comes_back(make, text, data):
    tokenizer = make()
    ids = tokenizer.encode("the " + text, add_special_tokens=False).ids
    split = data.draw(st.integers(1, len(ids)))
    assert decode(tokenizer, ids) == "the " + text
    # What the prompt leaves incomplete is completed by the output.
    before = reference(tokenizer, ids[:split]).rstrip(REPLACEMENT)
    assert before + stream_text(tokenizer, ids[:split], ids[split:]) == "the " + text


@pytest.mark.parametrize("make", OWN_TEXT)
@given(data=st.data())
def test_word_tokenizers_continue_their_prompt(make, data):
    tokenizer = make()
    count = tokenizer.get_vocab_size() - 1
    ids = data.draw(st.lists(st.integers(2, count), min_size=2, max_size=20))
    split = data.draw(st.integers(1, len(ids) - 1))
    together = decode(tokenizer, ids[:split]) + stream_text(tokenizer, ids[:split], ids[split:])
    if make is not tiny_tokenizers.end_of_word:
        assert together == decode(tokenizer, ids)
        return
    # This decoder drops the space after the last word of whatever it is given.
    assert together.replace(" ", "") == decode(tokenizer, ids).replace(" ", "")
    expected = decode(tokenizer, ids[split - 1 :])[len(decode(tokenizer, [ids[split - 1]])) :]
    assert stream_text(tokenizer, ids[:split], ids[split:]).strip(" ") == expected.strip(" ")


@given(st.lists(st.integers(0, 520), max_size=30))
def test_any_ids_of_a_byte_level_vocabulary_give_exactly_the_full_decoding(ids):
    tokenizer = tiny_tokenizers.byte_level()
    prompt_ids = tokenizer.encode("the quick").ids
    expected = decode(tokenizer, prompt_ids + ids).removeprefix("the quick")
    assert stream_text(tokenizer, prompt_ids, ids) == expected


@given(st.lists(st.integers(0, 300), max_size=30))
def test_any_ids_of_a_byte_fallback_vocabulary_give_all_text_that_is_valid(ids):
    tokenizer = tiny_tokenizers.byte_fallback()
    prompt_ids = tokenizer.encode("the quick").ids
    decoded = decode(tokenizer, prompt_ids + ids).removeprefix("the quick")
    text = stream_text(tokenizer, prompt_ids, ids)
    if REPLACEMENT not in decoded:
        assert text == decoded
    assert "the quick" + text == reference(tokenizer, prompt_ids + ids)


@pytest.mark.parametrize("make", ANY_TEXT)
@given(text=TEXTS)
def test_text_is_shown_as_soon_as_its_character_is_complete(make, text):
    tokenizer = make()
    prompt_ids = tokenizer.encode("the", add_special_tokens=False).ids
    ids = tokenizer.encode("the" + text, add_special_tokens=False).ids[len(prompt_ids) :]
    if make is tiny_tokenizers.byte_level and not text.startswith(" "):
        ids = tokenizer.encode(text).ids
    stream = TextStream(detokenizer_of(tokenizer), prompt_ids)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        shown += stream.push(token_id).visible
        so_far = reference(tokenizer, prompt_ids + ids[:count]).removeprefix("the")
        assert shown == so_far.rstrip(REPLACEMENT)


def test_a_character_split_over_tokens_comes_with_the_last_of_them():
    tokenizer = tiny_tokenizers.byte_fallback()
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🚀".encode()]
    stream = TextStream(detokenizer_of(tokenizer), [5])
    assert [stream.push(token_id).visible for token_id in ids] == ["", "", "", "🚀"]


def test_bytes_that_the_prompt_left_open_are_no_output():
    tokenizer = tiny_tokenizers.byte_fallback()
    byte_ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🚀".encode()]
    word = tokenizer.token_to_id("▁the")
    assert stream_text(tokenizer, [word, *byte_ids[:2]], byte_ids[2:]) == "🚀"
    assert stream_text(tokenizer, [word, *byte_ids[:2]], [word]) == " the"
    assert stream_text(tokenizer, [word, *byte_ids[:2]], []) == ""
    assert stream_text(tokenizer, [word], byte_ids[:2]) == REPLACEMENT


def test_an_endless_run_of_partial_characters_keeps_no_more_than_three_bytes():
    tokenizer = tiny_tokenizers.byte_fallback()
    lead = tokenizer.token_to_id("<0xF0>")
    stream = TextStream(detokenizer_of(tokenizer), [])
    for _ in range(1000):
        stream.push(lead)
        assert len(stream._pending) <= 3


def test_the_first_word_after_a_prompt_keeps_its_space():
    tokenizer = tiny_tokenizers.byte_fallback()
    word = tokenizer.token_to_id("▁the")
    assert decode(tokenizer, [word]) == "the"
    assert stream_text(tokenizer, [word], [word, word]) == " the the"


def test_special_tokens_are_visible_apart_from_the_text():
    tokenizer = tiny_tokenizers.byte_level()
    detokenizer = Detokenizer(tokenizer)
    end, wide = (tokenizer.token_to_id(t) for t in (tiny_tokenizers.EOS, "<｜wide｜>"))
    call = tokenizer.token_to_id("<tool call>")
    stream = TextStream(detokenizer, [])
    assert stream.push(end) == ("", "<|end|>")
    assert stream.push(wide) == ("", "<｜wide｜>")
    assert stream.push(call) == ("<tool call>", "")
    assert [detokenizer.is_special(i) for i in (end, wide, call, 40)] == [True, True, False, False]


def test_a_special_token_ends_a_character_that_is_not_complete():
    tokenizer = tiny_tokenizers.byte_fallback()
    stream = TextStream(detokenizer_of(tokenizer), [])
    stream.push(tokenizer.token_to_id("<0xF0>"))
    assert stream.push(tokenizer.token_to_id(tiny_tokenizers.EOS)) == (REPLACEMENT, "<|end|>")


@pytest.mark.parametrize("make", ANY_TEXT + OWN_TEXT)
def test_ids_beyond_the_tokenizer_add_nothing(make):
    detokenizer = detokenizer_of(make())
    assert detokenizer.piece(10**6) == ""
    assert detokenizer.text(10**6) == ""
    assert not detokenizer.is_special(10**6)


def test_each_tokenizer_has_one_detokenizer():
    tokenizer = tiny_tokenizers.byte_level()
    same = Tokenizer.from_str(tokenizer.to_str())
    assert detokenizer_of(tokenizer) is detokenizer_of(tokenizer)
    assert detokenizer_of(same) is not detokenizer_of(tokenizer)


@pytest.mark.slow
def test_the_default_models_tokenizer_round_trips():
    from tests.helpers.default_model import default_model_dir

    tokenizer = Tokenizer.from_file(str(default_model_dir() / "tokenizer.json"))
    prompt_ids = tokenizer.encode("Say something:").ids

    @given(
        st.one_of(
            TEXTS.map(lambda text: tokenizer.encode(text).ids),
            st.lists(st.integers(0, tokenizer.get_vocab_size() + 9), max_size=40),
        )
    )
    def check(ids):
        expected = decode(tokenizer, prompt_ids + ids).removeprefix("Say something:")
        assert stream_text(tokenizer, prompt_ids, ids) == expected

    check()
