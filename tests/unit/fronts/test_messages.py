"""Messages become bytes and messages again, whatever is in their texts."""

from __future__ import annotations

import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_contract.step import Alternatives, FinishCode
from lorax_router.fronts.messages import (
    AskCall,
    AskLoad,
    ChunkRest,
    Down,
    TellCall,
    TellChunks,
    TellLoad,
    Up,
    decode_down,
    decode_up,
    encode,
    key_of,
    of_key,
)

KINDS = [*typing.get_args(Up), *typing.get_args(Down)]
CALL = AskCall(
    7, "PUT", "http", "1.1", "/a b", b"/a%20b", b"x=1", [(b"a", b"\xff")], ("::1", 5), None
)


def test_every_message_has_a_name_of_its_own() -> None:
    assert len({each.__name__ for each in KINDS}) == len(KINDS)
    assert all(each.__struct_config__.tag == each.__name__ for each in KINDS)


def test_bytes_of_a_call_are_what_they_were() -> None:
    assert decode_up(encode(CALL)) == CALL
    answer = TellCall(7, 204, [(b"a", b"1"), (b"a", b"2")], b"\x00\xff")
    assert decode_down(encode(answer)) == answer


def test_one_direction_is_not_taken_for_the_other() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_down(encode(CALL))


def test_text_that_is_no_unicode_is_repaired_and_the_rest_is_as_it_was() -> None:
    top = Alternatives([1], [float("-inf")], ["\udfff"])
    rest = ChunkRest(FinishCode.LENGTH, [top], "a\ud800b", None, [], 3)
    chunks = TellChunks([65536], [], [5], [-0.5], ["x\ud800"], [False], {0: rest})
    found = decode_down(encode(chunks))
    assert isinstance(found, TellChunks)
    assert (found.texts, found.logprobs, found.keys) == (["x?"], [-0.5], [65536])
    assert (found.rests[0].generated_text, found.rests[0].num_cached_tokens) == ("a?b", 3)
    assert found.rests[0].alternatives == [Alternatives([1], [float("-inf")], ["?"])]


def test_what_an_earlier_version_of_the_protocol_says_and_hears_of_loads() -> None:
    """Fields that came to the end later: one that does not know them says the same as before."""
    asked = msgspec.msgpack.encode(["AskLoad", 7])
    assert decode_up(asked) == AskLoad(7, {}, {})
    load = {
        "is_accepting": True, "num_slots": 4, "resident": ["poet"], "num_running": 1,
        "num_queued": 2, "num_queued_tokens": 3, "kv_in_use": 0.5,
    }  # fmt: skip
    told = decode_down(msgspec.msgpack.encode(["TellLoad", 7, load]))
    assert isinstance(told, TellLoad)
    assert told.load.served == {}

    class FormerAskLoad(msgspec.Struct, array_like=True, tag="AskLoad"):
        number: int

    former = msgspec.msgpack.decode(encode(AskLoad(7, {"t": 1.0})), type=FormerAskLoad)
    assert former.number == 7


@given(st.integers(0, 2**47), st.integers(0, 65535))
def test_a_key_has_both_of_its_numbers(number: int, sequence: int) -> None:
    assert of_key(key_of(number, sequence)) == (number, sequence)
