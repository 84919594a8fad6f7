"""Embed and Classify over a real connection: vectors, labels, entities, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.helpers.grpc_calls import grpc_served, refused
from tests.helpers.http_app import World, limits, server_info
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session
from tests.helpers.pooled_world import classifying

from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind, VectorFacts
from lorax_contract.step import OutputKind
from lorax_proto import lorax_pb2 as pb
from lorax_router.grpc_api.responses import info_response
from lorax_router.service.abilities import Abilities

MADE_FOR = VectorFacts(
    size=4, pooling=Pooling.MEAN, normalize=False, prompts=(("query", "w7 "),), default_prompt="w9 "
)


def encoder() -> World:
    return World(abilities=Abilities(generates=False, vectors=MADE_FOR))


def judge() -> Session:
    head = HeadFacts(pooling=Pooling.FIRST, labels=("bad", "good"), scores=ScoreKind.ANY_OF)
    # ln 1 and ln 3: sigmoids of 1/2 and 3/4.
    return classifying(head, lambda spec: [0.0, 1.0986123])


def unit(*values: float) -> Any:
    return pytest.approx((np.array(values) / np.linalg.norm(values)).tolist())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "w1 w2"}, [900, 2, 4, Pooling.MEAN]),
        ({"text": "w1 w2", "add_special_tokens": False}, [9, 2, 3, Pooling.MEAN]),
        ({"text": "w1", "prompt_name": "query", "normalize": True}, unit(900, 1, 3, Pooling.MEAN)),
        ({"text": "w1 w2", "dimensions": 2}, [900, 2]),
        ({"text": "w1 w2 w3", "cut_to": 3}, [900, 1, 3, Pooling.MEAN]),
        ({"text": "w1 " * 30, "cut_to": 0}, [900, 1, 20, Pooling.MEAN]),
        (
            {"token_ids": pb.TokenIds(ids=[5, 6]), "pooling": pb.POOLING_FIRST},
            [5, 6, 2, Pooling.FIRST],
        ),
        ({"text": "w1", "pooling": pb.POOLING_LAST}, [900, 1, 3, Pooling.LAST]),
    ],
)
def test_a_text_has_a_vector(fields: dict[str, Any], expected: Any) -> None:
    @in_loop
    async def scene() -> None:
        world = encoder()
        async with grpc_served(world) as served:
            answer = await served.stub.Embed(pb.EmbedRequest(**fields), timeout=30)
            assert list(answer.values) == expected
            assert answer.request_id
            (spec,) = world.engine.submitted
            assert spec.output is OutputKind.VECTOR
            assert answer.usage.prompt_tokens == len(spec.prompt_ids)
            assert answer.usage.generated_tokens == 0
            assert answer.timings.total_s > 0

    scene()


@in_loop
async def test_a_text_has_its_labels_best_first() -> None:
    session = judge()
    async with grpc_served(session.world) as served:
        asked = pb.ClassifyRequest(text="w1", second_text="w2")
        answer = await served.stub.Classify(asked, timeout=30)
        assert [(each.label, each.score) for each in answer.labels] == [
            ("good", pytest.approx(0.75)), ("bad", pytest.approx(0.5)),
        ]  # fmt: skip
        assert not answer.entities
        assert answer.usage.prompt_tokens == 3
        raw = await served.stub.Classify(pb.ClassifyRequest(text="w1", raw_scores=True), timeout=30)
        assert [each.score for each in raw.labels] == [pytest.approx(1.0986123), 0]
        first, second = session.world.engine.submitted
        assert (list(first.prompt_ids), first.second_start) == ([900, 1, 2], 2)
        assert (list(second.prompt_ids), second.second_start) == ([900, 1], 0)


@in_loop
async def test_entities_have_places_in_bytes() -> None:
    head = HeadFacts(pooling=Pooling.EACH, labels=("O", "B-X", "I-X"))
    session = classifying(head, lambda spec: [0, 9, 0, 0, 9, 0, 9, 0, 0, 0, 0, 9])
    async with grpc_served(session.world) as served:
        answer = await served.stub.Classify(pb.ClassifyRequest(text="é w1 w2"), timeout=30)
        found = [(each.entity_group, each.word, each.start, each.end) for each in answer.entities]
        assert found == [("X", "é", 0, 2), ("X", "w2", 6, 8)]
        assert not answer.labels


@pytest.mark.parametrize(
    ("method", "message", "field", "words"),
    [
        ("Embed", pb.EmbedRequest(), "prompt", "set `text` or `token_ids`"),
        ("Embed", pb.EmbedRequest(text=""), "prompt", "must not be empty"),
        ("Embed", pb.EmbedRequest(text="w1", pooling=99), "pooling", "99 is not known"),
        ("Embed", pb.EmbedRequest(text="w1", dimensions=5), "dimensions", "at most the model's 4"),
        ("Embed", pb.EmbedRequest(text="w1", prompt_name="x"), "prompt_name", "one of 'query'"),
        ("Embed", pb.EmbedRequest(text="w1 " * 30), "prompt", "shorten it or set `cut_to`"),
        ("Embed", pb.EmbedRequest(text="w1", cut_to=21), "cut_to", "must be from 1 to 20"),
        ("Classify", pb.ClassifyRequest(text="w1"), "adapter.id", "a classification head"),
        ("Classify", pb.ClassifyRequest(), "text", "must not be empty"),
        ("Generate", pb.GenerateRequest(text="w1"), "", "this model generates no text"),
        ("Chat", pb.ChatRequest(messages=[{"role": "user"}]), "", "this model generates no text"),
    ],
)
def test_faults_are_said_by_the_names_of_the_message(
    method: str, message: Any, field: str, words: str
) -> None:
    @in_loop
    async def scene() -> None:
        world = judge().world if method == "Classify" and not message.text else encoder()
        async with grpc_served(world) as served:
            found = await refused(getattr(served.stub, method)(message, timeout=30))
            assert found.code == "INVALID_ARGUMENT"
            assert words in found.text
            assert not field or found.field == field
            assert not world.engine.submitted

    scene()


def test_info_tells_what_a_model_does() -> None:
    info = info_response(server_info(limits(), tasks=("embed", "classify"), labels=("bad", "good")))
    assert (list(info.tasks), list(info.labels)) == (["embed", "classify"], ["bad", "good"])
