"""The end of a row: which reason wins, and stop strings wherever tokens cut them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_contract.step import FinishCode, StoppingParams
from lorax_shard.engine.stopping import Stopping, StopStrings

EOS, OTHER, STOP = 2, 7, 9


def make_stopping(**params):
    return Stopping(StoppingParams(**{"max_new_tokens": 3, **params}), {EOS, 3})


def push_all(stopping, *tokens):
    return [stopping.push(token_id, text).finish for token_id, text in tokens]


RUNNING, LENGTH, END, STOPPED = (
    FinishCode.RUNNING,
    FinishCode.LENGTH,
    FinishCode.EOS_TOKEN,
    FinishCode.STOP_SEQUENCE,
)


def test_the_length_limit_counts_every_token():
    tokens = [(OTHER, "a"), (OTHER, ""), (OTHER, "b")]
    assert push_all(make_stopping(), *tokens) == [RUNNING, RUNNING, LENGTH]


def test_every_id_of_the_eos_set_ends_the_row():
    assert push_all(make_stopping(), (3, "")) == [END]
    assert push_all(make_stopping(), (EOS, "")) == [END]


def test_eos_at_the_length_limit_counts_as_eos():
    assert push_all(make_stopping(max_new_tokens=2), (OTHER, "a"), (EOS, "")) == [RUNNING, END]


def test_ignored_eos_goes_on_to_the_limit():
    stopping = make_stopping(ignore_eos=True)
    assert push_all(stopping, (EOS, ""), (EOS, ""), (EOS, "")) == [RUNNING, RUNNING, LENGTH]


def test_a_stop_token_ends_the_row_also_at_the_limit_and_as_ignored_eos():
    assert push_all(make_stopping(stop_token_ids=(STOP,)), (STOP, "x")) == [STOPPED]
    assert push_all(make_stopping(stop_token_ids=(STOP,), max_new_tokens=1), (STOP, "")) == [
        STOPPED
    ]
    assert push_all(make_stopping(stop_token_ids=(EOS,), ignore_eos=True), (EOS, "")) == [STOPPED]
    assert push_all(make_stopping(stop_token_ids=(EOS,)), (EOS, "")) == [END]


def test_a_stop_string_at_the_limit_counts_as_stop_string():
    stopping = make_stopping(stop_sequences=("end",), max_new_tokens=2)
    assert push_all(stopping, (OTHER, "e"), (OTHER, "nd of it")) == [RUNNING, STOPPED]


@pytest.mark.parametrize(
    ("strings", "texts", "kept"),
    [
        (["stop"], ["a st", "op"], "a stop"),
        (["stop"], ["sto", "p it"], "stop"),
        (["b"], ["abcb"], "ab"),
        (["xyz", "y"], ["ax", "yz"], "axy"),  # the earliest end wins, not the earliest start
        (["ab", "abc"], ["abc"], "ab"),
        (["aab"], ["aa", "ab"], "aaab"),
        (["\n\n"], ["x\n", "\ny"], "x\n\n"),
        (["🙂b"], ["a🙂", "bc"], "a🙂b"),
    ],
)
def test_stop_strings_across_tokens(strings, texts, kept):
    matcher = StopStrings(strings)
    shown = ""
    for text in texts:
        num_kept = matcher.push(text)
        shown += text if num_kept is None else text[:num_kept]
        assert (num_kept is not None) == (text is texts[-1])
    assert shown == kept


def test_empty_stop_strings_never_match():
    assert StopStrings([""]).push("text") is None
    assert StopStrings([]).push("text") is None


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("ab", max_size=4), max_size=12),
)
def test_stop_strings_are_found_as_in_the_whole_text(strings, texts):
    matcher = StopStrings(strings)
    shown = ""
    for text in texts:
        num_kept = matcher.push(text)
        ends = [
            end
            for end in range(1, len(shown + text) + 1)
            if any((shown + text)[:end].endswith(string) for string in strings)
        ]
        if ends:
            assert num_kept == ends[0] - len(shown)
            return
        assert num_kept is None
        shown += text


def test_memory_of_the_text_is_bounded_by_the_longest_string():
    matcher = StopStrings(["abcdef", "xy"])
    for _ in range(100):
        matcher.push("some text of a token")
        assert len(matcher._tail) == 5


def test_among_the_first_tokens_only_the_limit_ends_the_row():
    stopping = make_stopping(
        min_new_tokens=3, max_new_tokens=9, stop_token_ids=(STOP,), stop_sequences=("x",)
    )
    tokens = [(EOS, ""), (STOP, "x"), (OTHER, "x"), (OTHER, "b"), (EOS, "")]
    assert push_all(stopping, *tokens) == [RUNNING] * 4 + [END]
    stopping = make_stopping(min_new_tokens=3, max_new_tokens=3)
    assert push_all(stopping, (EOS, ""), (EOS, ""), (OTHER, "")) == [RUNNING, RUNNING, LENGTH]


def test_a_stop_string_may_begin_among_the_first_tokens_and_end_later():
    stopping = make_stopping(min_new_tokens=2, max_new_tokens=9, stop_sequences=("abcd", "xy"))
    tokens = [(OTHER, "xy"), (OTHER, "ab"), (OTHER, "c"), (OTHER, "de")]
    assert push_all(stopping, *tokens) == [RUNNING, RUNNING, RUNNING, STOPPED]
