"""A row's output: texts that add up, and a state that can be rebuilt at any token."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers import tiny_tokenizers

from lorax_contract.step import FinishCode, StoppingParams
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.engine.output import RowOutput

TOKENIZERS = [tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback, tiny_tokenizers.unigram]


@functools.cache
def reader_of(tokenizer):
    return Detokenizer(tokenizer)


def make_output(tokenizer, prompt="the", *, past_output_ids=(), eos=(), **params):
    stopping = StoppingParams(**{"max_new_tokens": 100, **params})
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    return RowOutput(reader_of(tokenizer), prompt_ids, stopping, eos, past_output_ids)


def run(output, ids):
    """Push ids until the row ends; return what was emitted."""
    emitted = []
    for token_id in ids:
        emitted.append(output.push(token_id))
        if emitted[-1].finish != FinishCode.RUNNING:
            break
    return emitted


@pytest.mark.parametrize("make", TOKENIZERS)
@given(data=st.data())
def test_a_rebuilt_output_goes_on_exactly_as_an_uninterrupted_one(make, data):
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=25))
    params = {
        "max_new_tokens": data.draw(st.integers(1, 30)),
        "stop_sequences": tuple(data.draw(st.lists(st.text("the o🙂", max_size=3), max_size=3))),
        "stop_token_ids": tuple(data.draw(st.lists(st.sampled_from(ids or [0]), max_size=1))),
        "ignore_eos": data.draw(st.booleans()),
    }
    whole = make_output(tokenizer, eos={1}, **params)
    emitted = run(whole, ids)
    split = data.draw(st.integers(0, max(0, len(emitted) - 1)))
    rebuilt = make_output(tokenizer, eos={1}, past_output_ids=ids[:split], **params)
    assert run(rebuilt, ids[split:]) == emitted[split:]
    assert rebuilt.generated_text == whole.generated_text


@pytest.mark.parametrize("make", TOKENIZERS)
@given(data=st.data())
def test_the_texts_of_plain_tokens_add_up_to_the_generated_text(make, data):
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 2), max_size=25))
    strings = tuple(data.draw(st.lists(st.text("the o", min_size=1, max_size=2), max_size=2)))
    output = make_output(
        tokenizer,
        prompt=data.draw(st.sampled_from(["the", "né🙂"])),
        max_new_tokens=data.draw(st.integers(1, 20)),
        min_new_tokens=data.draw(st.integers(0, 3)),
        stop_sequences=strings,
        eos=data.draw(st.sets(st.integers(0, 2))),
    )
    emitted, plain = [], ""
    for token_id in ids:
        emitted.append(output.push(token_id))
        plain += "" if emitted[-1].special else emitted[-1].text
        assert plain == output.generated_text
        if emitted[-1].finish != FinishCode.RUNNING:
            break
    if emitted and emitted[-1].finish == FinishCode.STOP_SEQUENCE:
        assert output.generated_text.endswith(strings)


# Words, characters of several bytes, right to left, vowels that combine, emoji joined by others.
SCRIPTS = [
    "the quick fox",
    "naïve café Ωß",
    "你好世界 漢字",
    "مرحبا بالعالم שלום",
    "नमस्ते 🙂👩‍👩‍👧🇫🇷",
]


@pytest.mark.parametrize("make", [tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback])
@pytest.mark.parametrize("text", SCRIPTS)
def test_texts_cut_after_any_token_add_up_and_are_the_beginning_of_the_whole(make, text):
    tokenizer = make()
    ids = tokenizer.encode(" " + text, add_special_tokens=False).ids
    for limit in range(1, len(ids) + 1):
        for strings in ((), (text[len(text) // 2],)):
            output = make_output(tokenizer, max_new_tokens=limit, stop_sequences=strings)
            emitted = run(output, ids)
            shown = "".join(each.text for each in emitted)
            assert shown == output.generated_text
            assert text.startswith(shown.lstrip(" "))
            assert emitted[-1].finish != FinishCode.RUNNING


def test_a_character_that_a_special_token_cuts_off_is_in_no_plain_text():
    tokenizer = tiny_tokenizers.byte_fallback()
    id_of = tokenizer.token_to_id
    output = make_output(tokenizer)
    ids = [id_of(token) for token in ("▁the", "<0xF0>", tiny_tokenizers.EOS, "▁the")]
    texts = [(text, special) for text, special, _ in run(output, ids)]
    assert texts == [(" the", False), ("", False), ("\ufffd<|end|>", True), (" the", False)]
    assert output.generated_text == " the the"


def test_eos_is_visible_in_its_token_and_not_in_the_text():
    tokenizer = tiny_tokenizers.byte_level()
    end = tokenizer.token_to_id(tiny_tokenizers.EOS)
    output = make_output(tokenizer, eos={end})
    ids = [*tokenizer.encode(" quick").ids, end]
    emitted = run(output, ids)
    assert emitted[-1] == ("<|end|>", True, FinishCode.EOS_TOKEN)
    assert all(not special and finish == FinishCode.RUNNING for _, special, finish in emitted[:-1])
    assert output.generated_text == " quick"


def test_a_stop_string_cuts_the_rest_of_its_token():
    tokenizer = tiny_tokenizers.byte_level()
    call = tokenizer.token_to_id("<tool call>")
    output = make_output(tokenizer, stop_sequences=("k<tool",))
    ids = tokenizer.encode(" quick").ids
    emitted = run(output, [*ids, call, *ids])
    assert emitted[-1] == ("<tool", False, FinishCode.STOP_SEQUENCE)
    assert len(emitted) == len(ids) + 1
    assert output.generated_text == " quick<tool"


def test_a_stop_string_may_span_a_special_token_but_is_not_found_in_it():
    tokenizer = tiny_tokenizers.byte_level()
    end = tokenizer.token_to_id(tiny_tokenizers.EOS)
    a, b = (tokenizer.token_to_id(token) for token in "ab")
    output = make_output(tokenizer, stop_sequences=("end", "ab"))
    assert [e.finish for e in run(output, [a, end, b, a])] == [
        FinishCode.RUNNING,
        FinishCode.RUNNING,
        FinishCode.STOP_SEQUENCE,
    ]
    assert output.generated_text == "ab"


def test_the_prompt_is_not_searched_for_stop_strings():
    tokenizer = tiny_tokenizers.byte_level()
    output = make_output(tokenizer, prompt="a", stop_sequences=("ab",))
    assert output.push(tokenizer.token_to_id("b")).finish == FinishCode.RUNNING


@pytest.mark.parametrize(
    ("limit", "ends", "finish"),
    [
        (3, {}, FinishCode.LENGTH),
        (9, {"eos": "<0x9F>"}, FinishCode.EOS_TOKEN),
        (9, {"stop": "<0x9F>"}, FinishCode.STOP_SEQUENCE),
        (9, {"eos": tiny_tokenizers.EOS}, FinishCode.EOS_TOKEN),
    ],
)
def test_a_character_that_the_end_cuts_off_is_left_out(limit, ends, finish):
    tokenizer = tiny_tokenizers.byte_fallback()
    id_of = tokenizer.token_to_id
    tokens = ["▁the", "<0xF0>", "<0x9F>"]
    eos = {id_of(ends["eos"])} if "eos" in ends else set()
    if tiny_tokenizers.EOS in ends.values():
        tokens.append(tiny_tokenizers.EOS)
    stops = (id_of(ends["stop"]),) if "stop" in ends else ()
    output = make_output(tokenizer, max_new_tokens=limit, eos=eos, stop_token_ids=stops)
    emitted = run(output, [id_of(token) for token in tokens])
    assert emitted[-1].finish == finish
    texts = [e.text for e in emitted]
    special = tiny_tokenizers.EOS if emitted[-1].special else ""
    assert "".join(texts) == " the" + special
    assert output.generated_text == " the"


def test_only_the_end_of_the_prompt_is_read():
    tokenizer = tiny_tokenizers.byte_level()

    class Prompt(list):
        def __getitem__(self, key):
            assert isinstance(key, slice)
            part = super().__getitem__(key)
            assert len(part) < 10
            return part

        def __iter__(self):
            raise AssertionError("read as a whole")

    output = RowOutput(
        reader_of(tokenizer), Prompt([70] * 5000), StoppingParams(max_new_tokens=5), ()
    )
    assert output.push(tokenizer.token_to_id("a")).text == "a"


def test_a_token_that_is_known_to_be_plain_is_not_read_again():
    tokenizer = tiny_tokenizers.byte_level()
    known, asked = Detokenizer(tokenizer), []

    class Asked:
        plain_texts = known.plain_texts

        def piece(self, token_id):
            asked.append(token_id)
            return known.piece(token_id)

        def is_special(self, token_id):
            return known.is_special(token_id)

    ids = tokenizer.encode(" the quick fox").ids
    for strings in ((), ("quill", "fo!")):
        output = RowOutput(
            Asked(), ids, StoppingParams(max_new_tokens=900, stop_sequences=strings), (2,)
        )
        run(output, ids)
        asked.clear()
        run(output, ids * 50)
        assert asked == []
        assert output.generated_text == " the quick fox" * 51
