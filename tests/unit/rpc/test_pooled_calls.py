"""LoRAX's Embed and Classify over the toy engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.toy_paged_model import NAN_ID, expected_vector, make_engine

from lorax_contract.errors import GenerationError, ValidationError
from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind, VectorFacts
from lorax_proto import generate_pb2 as pb
from lorax_shard.engine.engine import Engine
from lorax_shard.model.interface import SEQUENCE, TOKENS
from lorax_shard.rpc.errors import NotServedError
from lorax_shard.rpc.lorax_batches import LoraxBatches
from lorax_shard.rpc.pooled_calls import PooledCalls

# The last one is longer than the step of eight tokens below.
PROMPTS = {1: [7, 9, 11, 13, 15], 2: [40, 41, 42], 3: [90, 91], 4: [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]}
LABELS = ("bad", "fair", "good")


def calls(engine: Engine, vectors: VectorFacts | None = None) -> PooledCalls:
    batches = LoraxBatches(engine, max_step_tokens=8)
    return PooledCalls(engine, batches, vectors or VectorFacts(), 32)


def batch(prompts: dict[int, list[int]] | None = None, **fields: Any) -> pb.Batch:
    given = PROMPTS if prompts is None else prompts
    requests = [
        pb.Request(id=number, tokenized_inputs=pb.TokenizedInputs(ids=ids), **fields)
        for number, ids in given.items()
    ]
    return pb.Batch(id=1, requests=requests, size=len(requests))


def with_head(kind: str, facts: HeadFacts) -> tuple[Engine, torch.Tensor]:
    """An engine whose model scores by a matrix (hidden x labels), and the matrix."""
    engine = make_engine()
    hidden = len(expected_vector([5], Pooling.LAST))
    matrix = torch.randn(hidden, len(facts.labels), generator=torch.Generator().manual_seed(3))

    def score(
        asked: str, states: Sequence[torch.Tensor], slots: Sequence[int | None]
    ) -> list[torch.Tensor]:
        assert (asked, set(slots)) == (kind, {None})
        return [each.float() @ matrix for each in states]

    engine.model.head = lambda asked: facts if asked == kind else None
    engine.model.score = score
    return engine, matrix


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", [Pooling.LAST, Pooling.MEAN, Pooling.MAX])
def test_each_text_has_the_vector_that_the_model_was_made_for(
    pooling: Pooling, normalize: bool
) -> None:
    engine = make_engine()
    made = calls(engine, VectorFacts(pooling=pooling, normalize=normalize))
    reply = made.embed(made.read_embed(batch()))
    assert {each.request_id for each in reply.embeddings} == set(PROMPTS)
    for each in reply.embeddings:
        expected = expected_vector(PROMPTS[each.request_id], pooling).numpy()
        if normalize:
            expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(each.values, expected, rtol=1e-5, atol=1e-6)
    # Nothing of it stays.
    assert not [*engine.batch]


@pytest.mark.parametrize("kind", [ScoreKind.ONE_OF, ScoreKind.ANY_OF, ScoreKind.NUMBERS])
def test_a_text_has_all_labels_best_first(kind: ScoreKind) -> None:
    facts = HeadFacts(pooling=Pooling.LAST, labels=LABELS, scores=kind)
    engine, matrix = with_head(SEQUENCE, facts)
    made = calls(engine)
    reply = made.classify(made.read_classify(batch()))
    assert {each.request_id for each in reply.classify_prediction_lists} == set(PROMPTS)
    for each in reply.classify_prediction_lists:
        raw = expected_vector(PROMPTS[each.request_id], Pooling.LAST).float() @ matrix
        shares = {
            ScoreKind.ONE_OF: torch.softmax(raw, -1),
            ScoreKind.ANY_OF: torch.sigmoid(raw),
            ScoreKind.NUMBERS: raw,
        }[kind]
        order = torch.argsort(shares, descending=True).tolist()
        assert [*each.predictions] == [LABELS[place] for place in order]
        np.testing.assert_allclose(each.scores, shares[order].numpy(), rtol=1e-5, atol=1e-6)


def test_each_token_has_its_likeliest_label() -> None:
    facts = HeadFacts(pooling=Pooling.EACH, labels=LABELS)
    engine, matrix = with_head(TOKENS, facts)
    made = calls(engine)
    reply = made.classify(made.read_classify(batch()))
    for each in reply.classify_prediction_lists:
        ids = PROMPTS[each.request_id]
        states = expected_vector(ids, Pooling.EACH).reshape(len(ids), -1)
        shares = torch.softmax(states.float() @ matrix, -1)
        assert [*each.predictions] == [LABELS[place] for place in shares.argmax(dim=1).tolist()]
        np.testing.assert_allclose(each.scores, shares.amax(dim=1).numpy(), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_done_is_said_and_leaves_nothing() -> None:
    engine = make_engine()
    engine.model.head = lambda kind: None
    made = calls(engine)
    with pytest.raises(NotServedError, match="no classification head"):
        made.read_classify(batch())
    with pytest.raises(ValidationError, match="request 9: the prompt has 33 tokens"):
        made.read_embed(batch({9: [1] * 33}))
    with pytest.raises(GenerationError, match="request 2"):
        made.embed(made.read_embed(batch({1: [5, 6], 2: [NAN_ID] * 2})))
    assert not [*engine.batch]
    engine, _ = with_head(SEQUENCE, HeadFacts(pooling=Pooling.LAST, labels=LABELS))
    with pytest.raises(ValidationError, match="request 1: adapters do not classify by this call"):
        calls(engine).read_classify(batch(adapter_index=2))


def test_an_encoder_computes_prompts_whole_or_says_that_it_cannot() -> None:
    engine = make_engine()
    engine.model.is_encoder = True
    made = calls(engine)
    short = {number: ids for number, ids in PROMPTS.items() if number != 4}
    assert len(made.embed(made.read_embed(batch(short))).embeddings) == 3
    assert engine.model.passes == [[5, 3], [2]]
    with pytest.raises(ValidationError, match="request 4: 10 tokens do not fit in a step of 8"):
        made.embed(made.read_embed(batch()))
    assert not [*engine.batch]
