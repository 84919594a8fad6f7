"""Incremental text against the tokenizer's own decoding of all ids at once."""

import copy
import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers import tiny_tokenizers
from tokenizers import Tokenizer

from lorax_shard.engine.detokenizer import Detokenizer, TextStream, text_of
from lorax_shard.vocabulary import vocabulary_of

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


@functools.cache
def reader_of(tokenizer: Tokenizer) -> Detokenizer:
    return Detokenizer(tokenizer)


def stream_text(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> str:
    stream = TextStream(reader_of(tokenizer), prompt_ids)
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
    stream = TextStream(reader_of(tokenizer), prompt_ids)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        shown += stream.push(token_id).visible
        so_far = reference(tokenizer, prompt_ids + ids[:count]).removeprefix("the")
        assert shown == so_far.rstrip(REPLACEMENT)


def test_a_character_split_over_tokens_comes_with_the_last_of_them():
    tokenizer = tiny_tokenizers.byte_fallback()
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🚀".encode()]
    stream = TextStream(reader_of(tokenizer), [5])
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
    stream = TextStream(reader_of(tokenizer), [])
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
    stream = TextStream(reader_of(tokenizer), [])
    stream.push(tokenizer.token_to_id("<0xF0>"))
    assert stream.push(tokenizer.token_to_id(tiny_tokenizers.EOS)) == (REPLACEMENT, "<|end|>")


@pytest.mark.parametrize("make", ANY_TEXT + OWN_TEXT)
def test_ids_beyond_the_tokenizer_add_nothing(make):
    detokenizer = reader_of(make())
    assert detokenizer.piece(10**6) == ""
    assert text_of(detokenizer, 10**6) == ""
    assert not detokenizer.is_special(10**6)


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


# --- tokens of adapters' own ---------------------------------------------------------------


def with_changes(tokenizer: Tokenizer, number: int) -> Tokenizer:
    """Return a tokenizer with other tokens behind the shared ones, one of them special."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([f"<tool {number}>", f"né{number}"])
    own.add_special_tokens([f"<|end {number}|>"])
    return own


@pytest.mark.parametrize("make", ANY_TEXT + OWN_TEXT)
@given(data=st.data())
def test_an_adapters_texts_are_those_of_its_own_tokenizer(make, data):
    base = make()
    own = with_changes(base, 7)
    reader = reader_of(base).with_tokens(vocabulary_of(own))
    alone = Detokenizer(own)
    size = own.get_vocab_size()
    for token_id in data.draw(st.lists(st.integers(0, size + 3), max_size=20)) + [size - 1]:
        assert reader.piece(token_id) == alone.piece(token_id)
        assert reader.is_special(token_id) == alone.is_special(token_id)


@pytest.mark.parametrize("make", ANY_TEXT + OWN_TEXT)
def test_an_adapter_may_have_other_tokens_under_the_bases_ids(make):
    base = make()
    document = json.loads(base.to_str())
    renamed = "quokka"
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, dict):
        old = next(token for token, i in vocabulary.items() if i == 20)
        vocabulary[renamed] = vocabulary.pop(old)
        document["model"]["merges"] = []
    else:
        vocabulary[20][0] = renamed
    own = Tokenizer.from_str(json.dumps(document))
    reader, alone = reader_of(base).with_tokens(vocabulary_of(own)), Detokenizer(own)
    assert "quokka" in text_of(reader, 20)
    for token_id in range(base.get_vocab_size() + 2):
        assert reader.piece(token_id) == alone.piece(token_id)


def test_nine_adapters_with_tokens_of_their_own_take_turns_without_anything_made_anew():
    base = tiny_tokenizers.byte_level()
    detokenizer = Detokenizer(base)
    made = []
    make = detokenizer._maker.make
    detokenizer._maker.make = lambda token: made.append(token) or make(token)
    readers = [detokenizer.with_tokens(vocabulary_of(with_changes(base, n))) for n in range(9)]
    assert made == []
    first = base.get_vocab_size()
    for _ in range(10):
        for number, reader in enumerate(readers):
            assert reader.piece(first) == f"<tool {number}>"
            assert reader.piece(40) == detokenizer.piece(40)
    assert sorted(made) == sorted([base.id_to_token(40), *(f"<tool {n}>" for n in range(9))])


def test_what_is_kept_of_adapters_tokens_is_bounded(monkeypatch):
    monkeypatch.setattr("lorax_shard.engine.detokenizer._ADAPTER_PIECES_BYTES", 2000)
    base = tiny_tokenizers.byte_level()
    detokenizer = Detokenizer(base)
    own = copy.deepcopy(base)
    own.add_tokens([f"<{'long ' * 30}{number}>" for number in range(50)] + ["x" * 5000])
    reader, alone = detokenizer.with_tokens(vocabulary_of(own)), Detokenizer(own)
    for token_id in range(own.get_vocab_size()):
        assert reader.piece(token_id) == alone.piece(token_id)
    assert detokenizer._adapter_pieces.currsize <= 2000


def changed_at(tokenizer: Tokenizer, token_id: int) -> Tokenizer:
    """Return a tokenizer whose token with an id of the base's is special."""
    document = json.loads(tokenizer.to_str())
    token = {"id": token_id, "content": tokenizer.id_to_token(token_id), "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append(token | flags)
    return Tokenizer.from_str(json.dumps(document))


@pytest.mark.parametrize("make", ANY_TEXT + OWN_TEXT)
@pytest.mark.parametrize("change", [with_changes, changed_at])
def test_what_is_called_plain_is_text_and_nothing_else(make, change):
    base = make()
    detokenizer = Detokenizer(base)
    own = change(base, 20)
    reader, alone = detokenizer.with_tokens(vocabulary_of(own)), Detokenizer(own)
    for token_id in range(own.get_vocab_size() + 3):
        for each in (detokenizer, reader):
            piece = each.piece(token_id)
            is_plain = isinstance(piece, str) and not each.is_special(token_id)
            assert each.plain_texts.get(token_id, piece) == piece
            assert is_plain or token_id not in each.plain_texts
        assert reader.is_special(token_id) == alone.is_special(token_id)
    words = base.encode("the quick", add_special_tokens=False).ids
    assert all(token_id in detokenizer.plain_texts for token_id in words)
