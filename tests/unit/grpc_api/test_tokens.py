"""Tokenize and Detokenize over a real connection."""

from __future__ import annotations

import pytest
from tests.helpers.grpc_calls import grpc_served, refused
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop

from lorax_proto import lorax_pb2 as pb


@in_loop
async def test_texts_and_chats_have_tokens_and_tokens_a_text():
    async with grpc_served(World()) as served:
        asked = pb.TokenizeRequest(text="w1 w22")
        answer = await served.stub.Tokenize(asked, timeout=30)
        assert [(each.id, each.text, each.start, each.stop) for each in answer.tokens] == [
            (900, "", 0, 0),
            (1, "w1", 0, 2),
            (22, "w22", 3, 6),
        ]
        bare = pb.TokenizeRequest(text="w1", add_special_tokens=False)
        assert [each.id for each in (await served.stub.Tokenize(bare, timeout=30)).tokens] == [1]
        asked = pb.TokenizeRequest(
            chat=pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="w5")])
        )
        answer = await served.stub.Tokenize(asked, timeout=30)
        assert [each.id for each in answer.tokens] == [902, 904, 903, 5, 902, 905, 903]
        assert (answer.tokens[3].text, answer.tokens[3].HasField("start")) == ("w5", False)
        text = await served.stub.Detokenize(pb.DetokenizeRequest(ids=[1, 22]), timeout=30)
        assert text.text == "w1 w22"


@pytest.mark.parametrize(
    ("name", "asked", "field"),
    [
        ("Tokenize", pb.TokenizeRequest(), "prompt"),
        ("Tokenize", pb.TokenizeRequest(chat=pb.ChatRequest()), "messages"),
        ("Detokenize", pb.DetokenizeRequest(ids=[906]), "ids"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(name, asked, field):
    @in_loop
    async def scene():
        async with grpc_served(World()) as served:
            found = await refused(getattr(served.stub, name)(asked, timeout=30))
            assert (found.code, found.field) == ("INVALID_ARGUMENT", field)

    scene()
