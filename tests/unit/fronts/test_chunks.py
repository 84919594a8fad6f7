"""The chunks of a step come out of one message as they went in."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.any_values import any_of

from lorax_contract.step import Alternatives, FinishCode, TokenColumns
from lorax_router.fronts.chunks import ChunkColumns, chunks_of
from lorax_router.fronts.messages import TellChunks, decode_down, encode, key_of, of_key
from lorax_router.service.engine.port import TokenChunk


@st.composite
def columns(draw: st.DrawFn, least: int = 1) -> TokenColumns:
    num = draw(st.integers(least, 4))
    return TokenColumns(
        draw(st.lists(st.integers(0, 2**31), min_size=num, max_size=num)),
        draw(st.lists(st.floats(allow_nan=False), min_size=num, max_size=num)),
        draw(st.lists(st.text(max_size=4), min_size=num, max_size=num)),
        draw(st.lists(st.booleans(), min_size=num, max_size=num)),
    )


@st.composite
def chunks(draw: st.DrawFn) -> tuple[TokenChunk, bool]:
    chunk = TokenChunk(draw(columns()))
    is_first = draw(st.booleans())
    if is_first:
        chunk = replace(
            chunk,
            num_cached_tokens=draw(st.integers(0, 1000)),
            prompt_tokens=draw(st.none() | columns(0)),
            prompt_alternatives=draw(st.lists(any_of(Alternatives), max_size=2)),
        )
    if draw(st.booleans()):
        chunk = replace(chunk, alternatives=draw(st.lists(any_of(Alternatives), max_size=2)))
    if draw(st.booleans()):
        finish = draw(st.sampled_from([FinishCode.LENGTH, FinishCode.STOP_SEQUENCE]))
        chunk = replace(chunk, finish=finish, generated_text=draw(st.text()))
    return chunk, is_first


@given(st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 127), chunks()), max_size=6))
@settings(deadline=None)
def test_chunks_cross_unchanged_in_one_message(given_chunks) -> None:
    sent: list[TellChunks] = []

    async def scene() -> None:
        gathered = ChunkColumns(sent.append)
        for number, sequence, (chunk, is_first) in given_chunks:
            gathered.add(key_of(number, sequence), chunk, is_first=is_first)
        assert not sent
        await asyncio.sleep(0)

    asyncio.run(scene())
    assert len(sent) == bool(given_chunks)
    found = [each for message in sent for each in chunks_of(decode_down(encode(message)))]
    assert [of_key(key) for key, _ in found] == [each[:2] for each in given_chunks]
    assert [chunk for _, chunk in found] == [chunk for _, _, (chunk, _) in given_chunks]
