"""Texts of sequences: streamed and whole ones are the same, stop sequences are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_contract.step import FinishCode, TokenColumns
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.text import TextAssembler

ALPHABET = "ab\n"


def chunk(
    *texts: str, finish: FinishCode = FinishCode.RUNNING, special: tuple[int, ...] = ()
) -> TokenChunk:
    flags = [number in special for number in range(len(texts))]
    ids = list(range(10, 10 + len(texts)))
    return TokenChunk(TokenColumns(ids, [0.0] * len(texts), list(texts), flags), finish)


def cut_as_shards_do(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """The pieces up to the end of the first stop sequence to be complete."""
    text = ""
    for number, piece in enumerate(pieces):
        for length in range(1, len(piece) + 1):
            if any((text + piece[:length]).endswith(stop) for stop in stops):
                return [*pieces[:number], piece[:length]], True
        text += piece
    return pieces, False


@given(
    st.lists(st.text(ALPHABET, max_size=4), min_size=1, max_size=12),
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
    st.booleans(),
    st.data(),
)
def test_a_streamed_text_is_the_whole_text_without_what_stopped_it(pieces, stops, include, data):
    pieces, stopped = cut_as_shards_do(pieces, stops)
    finish = FinishCode.STOP_SEQUENCE if stopped else FinishCode.LENGTH
    assembler = TextAssembler(stops, include_stop=include)
    num_first = data.draw(st.integers(0, len(pieces) - 1))
    shown = [assembler.feed(chunk(piece)) for piece in pieces[:num_first]]
    shown.append(assembler.feed(chunk(*pieces[num_first:], finish=finish)))
    whole = "".join(pieces)
    at_once = TextAssembler(stops, include_stop=include).feed(chunk(*pieces, finish=finish))
    assert "".join(shown) == at_once
    if not stopped:
        assert (at_once, assembler.stopped_by) == (whole, None)
        return
    assert assembler.stopped_by in stops
    assert at_once == (whole if include else whole.removesuffix(str(assembler.stopped_by)))
    # Nothing that was shown was taken back, and no stop sequence was shown.
    if not include:
        assert not any(stop in at_once for stop in stops)


def test_what_cannot_become_a_stop_sequence_is_not_held_back():
    assembler = TextAssembler(["END"])
    assert [assembler.feed(chunk(each)) for each in ("a", "bE", "N", "x", "E")] == [
        "a", "b", "", "ENx", "",
    ]  # fmt: skip
    assert assembler.feed(chunk("F", finish=FinishCode.LENGTH)) == "EF"


@pytest.mark.parametrize(
    ("include", "skip", "text"),
    [(False, True, "hi"), (True, True, "hi"), (False, False, "hi"), (True, False, "hi</s>")],
)
def test_the_token_that_ends_a_text_is_shown_on_request(include, skip, text):
    assembler = TextAssembler(include_stop=include, skip_special_tokens=skip)
    last = chunk("hi", "</s>", finish=FinishCode.EOS_TOKEN, special=(1,))
    assert assembler.feed(last) == text


def test_a_stop_token_is_cut_and_named():
    assembler = TextAssembler()
    assert assembler.feed(chunk("hi", " there", finish=FinishCode.STOP_SEQUENCE)) == "hi"
    assert assembler.stopped_by == 11


def test_special_tokens_within_a_text_are_shown_on_request():
    parts = chunk("a", "<tool>", "b", special=(1,))
    assert TextAssembler().feed(parts) == "ab"
    assert TextAssembler(skip_special_tokens=False).feed(parts) == "a<tool>b"


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_no_part_of_a_stop_sequence_wherever_they_stand(include, skip):
    """The shard looks for it in the text without them."""
    pieces = [("x", False), ("a", False), ("<s>", True), ("b", False)]
    for sizes in ([4], [1, 1, 1, 1], [2, 2], [1, 3]):
        assembler = TextAssembler(["ab"], include_stop=include, skip_special_tokens=skip)
        shown, at = [], 0
        for size in sizes:
            part, at = pieces[at : at + size], at + size
            flags = tuple(place for place, (_, special) in enumerate(part) if special)
            finish = FinishCode.STOP_SEQUENCE if at == 4 else FinishCode.RUNNING
            texts = [text for text, _ in part]
            shown.append(assembler.feed(chunk(*texts, special=flags, finish=finish)))
        whole = "xab" if skip else "xa<s>b"
        assert "".join(shown) == (whole if include else "x")
        assert assembler.stopped_by == "ab"


def test_a_stop_token_whose_text_ends_as_a_stop_sequence_is_the_token():
    assembler = TextAssembler(["s>"], skip_special_tokens=False)
    last = chunk("x", "<s>", special=(1,), finish=FinishCode.STOP_SEQUENCE)
    assert assembler.feed(last) == "x"
    assert assembler.stopped_by == 11
