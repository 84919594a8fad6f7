"""`/rerank` and `/score`, by a head that compares two texts, and by vectors where there is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session
from tests.helpers.pooled_world import classifying

from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_contract.step import OutputKind

RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")
SCORE = ("/score", "/v1/score")


def ranker(kind: ScoreKind = ScoreKind.ANY_OF) -> Session:
    """The score of a pair is a tenth of its last token's id."""
    head = HeadFacts(pooling=Pooling.FIRST, labels=("score",), scores=kind)
    return classifying(head, lambda spec: [spec.prompt_ids[-1] / 10])


def sigmoid(value: float) -> Any:
    return pytest.approx(1 / (1 + math.exp(-value)), abs=1e-6)


def cosine(first: list[int], second: list[int]) -> Any:
    """Of the vectors that a scripted engine gives: first id, last id, length, pooling (0)."""
    one, other = (np.array([each[0], each[-1], len(each), 0.0]) for each in (first, second))
    return pytest.approx(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)), abs=1e-6)


def prompts_of(session: Session) -> list[list[int]]:
    """What was computed; in which order is not said."""
    return sorted(list(spec.prompt_ids) for spec in session.world.engine.submitted)


async def answered(session: Session, path: str, **body: Any) -> Any:
    answer = await session.post(path, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("path", RERANK)
def test_texts_are_ranked_best_first_in_tei_s_words(path: str) -> None:
    @in_loop
    async def scene() -> None:
        session = ranker()
        found = await answered(session, path, query="w1", texts=["w5", "w9", "w7"])
        assert found == [
            {"index": 1, "score": sigmoid(0.9)},
            {"index": 2, "score": sigmoid(0.7)},
            {"index": 0, "score": sigmoid(0.5)},
        ]
        assert prompts_of(session) == [[900, 1, 5], [900, 1, 7], [900, 1, 9]]
        raw = await answered(
            session, path, query="w1", texts=["w5", "w9"], raw_scores=True, return_text=True
        )
        assert raw == [
            {"index": 1, "score": pytest.approx(0.9), "text": "w9"},
            {"index": 0, "score": pytest.approx(0.5), "text": "w5"},
        ]

    scene()


@pytest.mark.parametrize("path", RERANK)
def test_documents_are_ranked_in_cohere_s_words(path: str) -> None:
    @in_loop
    async def scene() -> None:
        documents = ["w5", {"text": "w9"}, "w7 w8"]
        body = {"model": "fake", "query": "w1", "documents": documents}
        document = await answered(ranker(ScoreKind.NUMBERS), path, **body)
        assert document.pop("id").startswith("rerank-")
        assert document == {
            "model": "fake",
            "results": [
                {"index": 1, "relevance_score": pytest.approx(0.9)},
                {"index": 2, "relevance_score": pytest.approx(0.8)},
                {"index": 0, "relevance_score": pytest.approx(0.5)},
            ],
            "usage": {"prompt_tokens": 10, "total_tokens": 10, "completion_tokens": 0},
            "meta": {"tokens": {"input_tokens": 10}},
        }
        best = await answered(ranker(), path, **body, top_n=1, return_documents=True)
        assert best["results"] == [
            {"index": 1, "relevance_score": sigmoid(0.9), "document": {"text": "w9"}}
        ]

    scene()


@in_loop
async def test_equal_texts_stay_in_their_order() -> None:
    found = await answered(ranker(), "/rerank", query="w1", texts=["w5", "w9", "w5", "w9"])
    assert [each["index"] for each in found] == [1, 3, 0, 2]


@pytest.mark.parametrize("path", SCORE)
def test_a_text_is_compared_with_one_or_with_several_or_each_with_its_own(path: str) -> None:
    @in_loop
    async def scene() -> None:
        for first, second, prompts in (
            ("w1", "w5", [[900, 1, 5]]),
            ("w1", ["w5", "w9"], [[900, 1, 5], [900, 1, 9]]),
            (["w1"], ["w5", "w9"], [[900, 1, 5], [900, 1, 9]]),
            (["w1", "w2"], ["w5", "w9"], [[900, 1, 5], [900, 2, 9]]),
        ):
            session = ranker()
            document = await answered(session, path, model="fake", text_1=first, text_2=second)
            assert prompts_of(session) == prompts
            assert document.pop("id").startswith("score-")
            assert document.pop("created") > 1_700_000_000
            num = sum(map(len, prompts))
            assert document == {
                "object": "list",
                "model": "fake",
                "data": [
                    {"index": index, "object": "score", "score": sigmoid(prompt[-1] / 10)}
                    for index, prompt in enumerate(prompts)
                ],
                "usage": {"prompt_tokens": num, "total_tokens": num, "completion_tokens": 0},
            }

    scene()


@in_loop
async def test_without_a_head_vectors_are_compared_and_each_is_made_once() -> None:
    session = Session(World(model_id="fake"))
    found = await answered(session, "/rerank", query="w800", texts=["w5", "w700", "w5"])
    assert [each["index"] for each in found] == [1, 0, 2]
    assert [each["score"] for each in found] == [
        cosine([900, 800], [900, 700]), cosine([900, 800], [900, 5]), cosine([900, 800], [900, 5]),
    ]  # fmt: skip
    specs = session.world.engine.submitted
    assert prompts_of(session) == [[900, 5], [900, 700], [900, 800]]
    assert {spec.output for spec in specs} == {OutputKind.VECTOR}
    scored = await answered(session, "/score", text_1=["w1", "w2"], text_2=["w2", "w2 w3"])
    assert [each["score"] for each in scored["data"]] == [
        cosine([900, 1], [900, 2]), cosine([900, 2], [900, 2, 3]),
    ]  # fmt: skip
    assert scored["usage"]["prompt_tokens"] == 7


@in_loop
async def test_texts_are_cut_where_that_is_asked_for_and_the_longer_one_first() -> None:
    session, long = ranker(), " ".join(f"w{number}" for number in range(30))
    await answered(session, "/rerank", query="w7 w8", texts=[long, "w9"], truncate=True)
    await answered(session, "/score", text_1=long, text_2="w9", truncate_prompt_tokens=4)
    assert prompts_of(session) == [[900, 0, 1, 9], [900, 7, 8, *range(22)], [900, 7, 8, 9]]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"query": "w1", "texts": []}, "`texts` must not be empty"),
        ({"query": "w1", "documents": ["w1", ""]}, "`documents` must not have empty texts"),
        ({"query": "w1", "documents": [{"title": "w1"}]}, "documents"),
        ({"query": "", "texts": ["w1"]}, "`query` must not be empty"),
        ({"query": "w1"}, "as `texts` or as `documents`"),
        ({"query": "w1", "texts": ["w1"], "documents": ["w1"]}, "as `texts` or as `documents`"),
        ({"query": "w1", "documents": ["w1"], "top_n": 0}, "`top_n` must be at least 1"),
        ({"query": "w1", "texts": ["w1 " * 30]}, "at most 25 tokens"),
    ],
)
def test_faults_of_rankings_are_said(body: dict[str, Any], words: str) -> None:
    @in_loop
    async def scene() -> None:
        for path in RERANK:
            answer = await ranker().post(path, **body)
            assert answer.status_code in (400, 422)
            error = answer.json()["error"]
            assert words in (error["message"] if path.startswith("/v1/") else error)

    scene()


@in_loop
async def test_faults_of_scores_are_said() -> None:
    answer = await ranker().post("/v1/score", text_1=["w1", "w2"], text_2=["w1"])
    assert answer.status_code == 400
    assert "`text_1` must be one text or as many as `text_2`" in answer.json()["error"]["message"]
    judge = classifying(HeadFacts(pooling=Pooling.FIRST, labels=("a", "b")), lambda spec: [0, 1])
    for path, body in (
        ("/rerank", {"query": "w1", "texts": ["w2"]}),
        ("/score", {"text_1": "w1", "text_2": "w2"}),
    ):
        answer = await judge.post(path, **body)
        assert answer.status_code == 422
        assert "needs a head with one label, and this one has 2" in answer.json()["error"]
    assert not judge.world.engine.submitted
