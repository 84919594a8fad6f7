"""TEI's routes: what is at the root of a model that generates nothing, its tokens, what is near what."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.helpers.adapter_world import HEADS, adapter_world
from tests.helpers.in_loop import in_loop

from lorax_contract.pooling import HeadFacts, Pooling
from lorax_router.http_api.lorax.encode import spans_json
from lorax_router.http_api.pooled import embed_routes
from lorax_router.service import abilities
from lorax_router.service.prompts.tokenizer_pool import TokenSpan
from lorax_router.shards.fake.shard import FakeModel, FakeShard

MODEL = FakeModel(vocab_size=900, eos_token_ids=frozenset())
TWO = HeadFacts(pooling=Pooling.FIRST, labels=("no", "yes"))
ONE = HeadFacts(pooling=Pooling.FIRST, labels=("match",))
TAGGER = HEADS["tagger"]
SIMILAR: dict[str, Any] = {"source_sentence": "w1", "sentences": ["w2", "w1", "w3 w4"]}


def shard_of(head: HeadFacts | None, *, generates: bool = False) -> FakeShard:
    facts = {"head": head, "is_encoder": not generates, "generates": generates}
    return FakeShard(MODEL, num_blocks=400, facts=facts)


@pytest.mark.parametrize("root", ["/", "/invocations"])
@pytest.mark.parametrize(
    ("head", "body", "path"),
    [
        (None, {"inputs": ["w1", "w2"]}, "/embed"),
        (TWO, {"inputs": [["w1"], ["w2", "w3"]]}, "/predict"),
        (ONE, {"query": "w1", "texts": ["w2", "w3"]}, "/rerank"),
        (TAGGER, {"inputs": "w1 w2"}, "/classify"),
    ],
)
def test_the_root_is_the_route_of_what_the_model_does(
    root: str, head: HeadFacts | None, body: dict[str, Any], path: str
) -> None:
    @in_loop
    async def scene() -> None:
        async with adapter_world(shard_of(head)) as world:
            answer, own = [await world.client.post(each, json=body) for each in (root, path)]
            assert answer.status_code == 200, answer.text
            assert answer.json() == own.json()

    scene()


@in_loop
async def test_at_the_root_a_text_alone_has_tei_s_answer() -> None:
    async with adapter_world(shard_of(None)) as world:
        root = (await world.client.post("/", json={"inputs": "w1"})).json()
        own = (await world.client.post("/embed", json={"inputs": "w1"})).json()
        assert root == [own["embeddings"]]
    async with adapter_world(shard_of(None, generates=True)) as world:
        (told,) = (await world.client.post("/", json={"inputs": "w1"})).json()
        assert told["generated_text"]


@in_loop
async def test_texts_are_compared_by_their_vectors() -> None:
    async with adapter_world(shard_of(TWO)) as world:
        answer = await world.client.post("/similarity", json={"inputs": SIMILAR})
        texts = [SIMILAR["source_sentence"], *SIMILAR["sentences"]]
        body = {"inputs": texts, "normalize": True}
        made = np.array((await world.client.post("/embed", json=body)).json())
        np.testing.assert_allclose(answer.json(), made[1:] @ made[0], atol=1e-6)
        parameters = {"adapter_id": "plain", "truncate": True}
        body = {"inputs": SIMILAR, "parameters": parameters}
        other = await world.client.post("/similarity", json=body)
        assert other.status_code == 200, other.text
        assert other.json() != answer.json()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": {**SIMILAR, "sentences": []}}, "`inputs.sentences` must not be empty"),
        ({"inputs": {**SIMILAR, "source_sentence": ""}}, "`inputs.source_sentence` must not be"),
        ({"inputs": SIMILAR, "parameters": {"prompt_name": "query"}}, "has no prompts"),
        ({"inputs": {**SIMILAR, "sentences": ["w1 " * 300]}}, "tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused(body: dict[str, Any], words: str) -> None:
    @in_loop
    async def scene() -> None:
        async with adapter_world(shard_of(None)) as world:
            answer = await world.client.post("/similarity", json=body)
            assert answer.status_code == 422
            assert words in answer.json()["error"]

    scene()


@in_loop
async def test_each_token_has_a_vector() -> None:
    async with adapter_world(shard_of(None)) as world:
        answer = await world.client.post("/embed_all", json={"inputs": ["w1 w2", "w3"]})
        assert [np.array(each).shape for each in answer.json()] == [(3, 4), (2, 4)]
        many = await world.client.post("/embed_all", json={"inputs": ["w1"] * 65})
        assert many.status_code == 422
        assert "at most 64 texts" in many.json()["error"]
        sparse = await world.client.post("/embed_sparse", json={"inputs": "w1"})
        assert sparse.status_code == 422
        assert "no sparse vectors" in sparse.json()["error"]


@pytest.mark.parametrize(
    ("most", "words"), [(11, "have 12 numbers or more"), (16, "have 20 numbers or more")]
)
def test_vectors_of_tokens_are_bounded(
    most: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text's own is refused before it is computed, and what is too much together on the way."""
    for module in (abilities, embed_routes):
        monkeypatch.setattr(module, "MOST_TOKEN_NUMBERS", most)

    @in_loop
    async def scene() -> None:
        async with adapter_world(shard_of(None)) as world:
            taken = await world.client.post("/embed_all", json={"inputs": ["w3"]})
            assert taken.status_code == 200
            answer = await world.client.post("/embed_all", json={"inputs": ["w1 w2", "w3"]})
            assert answer.status_code == 422
            assert words in answer.json()["error"]
            # The text's one vector is none of these.
            whole = await world.client.post("/embed", json={"inputs": "w1 w2 w3 w4 w5"})
            assert whole.status_code == 200

    scene()


@in_loop
async def test_tokens_are_told_and_read_as_tei_does() -> None:
    async with adapter_world(shard_of(None)) as world:
        told = (await world.client.post("/tokenize", json={"inputs": ["w1 w22", "w3"]})).json()
        assert [[token["id"] for token in each] for each in told] == [[900, 1, 22], [900, 3]]
        assert told[0][1] == {"id": 1, "text": "w1", "start": 0, "stop": 2, "special": False}
        one, several, whole = [
            (await world.client.post("/decode", json=body)).json()
            for body in (
                {"ids": [1, 22]},
                {"ids": [[1], [2, 3]]},
                {"ids": [1], "skip_special_tokens": False},
            )
        ]
        assert (one, several, whole) == (["w1 w22"], ["w1", "w2 w3"], ["w1"])
        for path, body, words in (
            ("/decode", {"ids": [10**6]}, "`ids`: 1000000 is not a token"),
            ("/tokenize", {"inputs": ["w1"], "prompt_name": "query"}, "`prompt_name`"),
            ("/tokenize", {"inputs": []}, "from 1 to 64 texts"),
        ):
            answer = await world.client.post(path, json=body)
            assert answer.status_code == 422
            assert words in answer.json()["error"]


def test_special_tokens_have_their_name_and_no_place() -> None:
    spans = [TokenSpan(7, "", 0, 0), TokenSpan(1, "w1", 0, 2)]
    assert json.loads(spans_json(spans, {7: "[CLS]"})) == [
        {"id": 7, "text": "[CLS]", "special": True, "start": None, "stop": None},
        {"id": 1, "text": "w1", "special": False, "start": 0, "stop": 2},
    ]


@pytest.mark.parametrize(
    ("head", "model_type"),
    [
        (None, {"embedding": {"pooling": "last_token"}}),
        (TWO, {"classifier": {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}}),
        (ONE, {"reranker": {"id2label": {"0": "match"}, "label2id": {"match": 0}}}),
        (TAGGER, None),
    ],
)  # fmt: skip
def test_info_tells_tei_s_clients_what_the_model_is(
    head: HeadFacts | None, model_type: Any
) -> None:
    @in_loop
    async def scene() -> None:
        async with adapter_world(shard_of(head)) as world:
            told = (await world.client.get("/info")).json()
            assert told["model_type"] == model_type
            assert (told["max_client_batch_size"], told["auto_truncate"]) == (2048, False)

    scene()
