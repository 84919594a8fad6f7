"""A streamed answer says what the whole one says, by the tokens as shards make their texts."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.chat_texts import COMMON, PARSERS, PIECES, parser_of
from tests.helpers.examples import examples
from tests.helpers.tiny_tokenizers import EOS, byte_level

from lorax_contract.step import FinishCode, StoppingParams, TokenColumns
from lorax_router.service.chat.answers import ChatAnswer
from lorax_router.service.chat.deltas import AssistantTurn
from lorax_router.service.chat.output_parser import OutputParser
from lorax_router.service.chat.reasoning import ThinkParser
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.text import TextStyle
from lorax_shard.engine.detokenizer import Detokenizer
from lorax_shard.engine.output import RowOutput

EOS_ID = byte_level().token_to_id(EOS)
READER = Detokenizer(byte_level())
SIGNS = [
    "<think>",
    "</think>",
    "é",
    "你好世界",
    "🙂",
    "👩‍👩‍👧",
    "Привет",
    "مرحبا",
    "नमस्ते",
    EOS,
    "<｜wide｜>",
]


def columns(emitted: Sequence[tuple[int, str, bool]]) -> TokenColumns:
    ids, texts, special = (list(each) for each in zip(*emitted))
    return TokenColumns(ids, [-0.5] * len(ids), texts, special)


@st.composite
def outputs(draw: st.DrawFn) -> tuple[list[tuple[int, str, bool]], FinishCode, str, list[str]]:
    """Tokens of a row as the shard shows them, how it ends, its text, and its stop strings."""
    pieces = draw(st.sampled_from(sorted(PIECES)).map(PIECES.__getitem__)) + COMMON + SIGNS
    text = draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=12).map("".join))
    ids = byte_level().encode(text, add_special_tokens=False).ids
    # Some tokens of which no text is made: halves of characters.
    for place, token in draw(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 499)), max_size=2)
    ):
        ids.insert(place, token)
    starts = draw(st.lists(st.integers(0, max(len(text) - 1, 0)), max_size=3))
    stops = [text[start : start + draw(st.integers(1, 5))] for start in starts]
    params = StoppingParams(
        max_new_tokens=draw(st.integers(1, len(ids))),
        min_new_tokens=draw(st.sampled_from([0, 0, 3])),
        stop_sequences=tuple(stops),
        stop_token_ids=(draw(st.sampled_from(ids)),) if draw(st.booleans()) else (),
        ignore_eos=draw(st.booleans()),
    )
    row, shown, finish = RowOutput(READER, [], params, [EOS_ID]), [], FinishCode.RUNNING
    for token_id in ids:
        if finish is FinishCode.RUNNING:
            emitted = row.push(token_id)
            finish = emitted.finish
            shown.append((token_id, emitted.text, emitted.special))
    return shown, finish, row.generated_text, stops


def said(answer: ChatAnswer, chunks: Sequence[TokenChunk]) -> tuple[AssistantTurn, bool, object]:
    turn = AssistantTurn()
    for chunk in chunks:
        turn.add(answer.deltas(chunk))
    return turn, answer.calls_tools, answer.stopped_by


@settings(max_examples=examples(150), deadline=None)
@given(st.data())
def test_an_answer_is_the_same_streamed_in_any_chunks(data: st.DataObject) -> None:
    shown, finish, text, stops = data.draw(outputs())
    style = TextStyle(
        stops=stops,
        include_stop=data.draw(st.booleans()),
        skip_special_tokens=data.draw(st.booleans()),
    )
    name = data.draw(st.sampled_from([None, *PARSERS]))
    thinks = data.draw(st.sampled_from([None, True, False]))

    def answer() -> ChatAnswer:
        reasoning = None if thinks is None else ThinkParser(is_inside=thinks)
        tools = None if name is None else parser_of(name)
        return ChatAnswer.new(style, lambda: OutputParser(reasoning, tools))

    whole = said(answer(), [TokenChunk(columns(shown), finish)])
    places = data.draw(st.sets(st.integers(1, len(shown)), max_size=6))
    for cuts in (sorted(places), list(range(1, len(shown)))):
        bounds = list(zip([0, *cuts], [*cuts, len(shown)]))
        parts = [shown[a:b] for a, b in bounds if a < b]
        chunks = [TokenChunk(columns(each), FinishCode.RUNNING) for each in parts[:-1]]
        chunks.append(TokenChunk(columns(parts[-1]), finish))
        assert said(answer(), chunks) == whole
    if name is None and thinks is None and style.include_stop and style.skip_special_tokens:
        assert whole[0].content == text


@settings(max_examples=examples(150), deadline=None)
@given(outputs(), st.booleans())
def test_what_ended_a_text_is_told_whatever_is_shown_of_special_tokens(
    output: tuple[list[tuple[int, str, bool]], FinishCode, str, list[str]], includes: bool
) -> None:
    shown, finish, text, stops = output
    found = []
    for skips in (True, False):
        style = TextStyle(stops=stops, include_stop=includes, skip_special_tokens=skips)
        chunk = TokenChunk(columns(shown), finish)
        turn, _, stopped_by = said(ChatAnswer.new(style, OutputParser), [chunk])
        found.append(stopped_by)
        if skips and includes:
            assert turn.content == text
        elif skips and isinstance(stopped_by, str):
            assert turn.content == text.removesuffix(stopped_by)
        elif skips and finish is not FinishCode.LENGTH and not shown[-1][2]:
            assert turn.content == text.removesuffix(shown[-1][1])
    assert found[0] == found[1]
    assert (found[0] is None) == (finish is not FinishCode.STOP_SEQUENCE)
