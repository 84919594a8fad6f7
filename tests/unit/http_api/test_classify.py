"""`/classify`, `/classify_batch` and `/predict`: labels and entities, in LoRAX's, TEI's, vLLM's words."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session
from tests.helpers.pooled_world import classifying

from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_contract.step import OutputKind, RequestSpec
from lorax_router.http_api.pooled.classify_routes import mean_times
from lorax_router.service.chat.output_parser import OutputParser
from lorax_router.service.results import GenerateResult, Timings

LABELS = ("bad", "fair", "good")
# ln 1, ln 2, ln 5: of their sum, 1/8, 2/8 and 5/8.
SCORES = (0.0, 0.6931472, 1.6094379)
SHARES = [("good", 0.625), ("fair", 0.25), ("bad", 0.125)]
TAGS = ("O", "B-PER", "I-PER", "I-LOC")


def texts_head(kind: ScoreKind = ScoreKind.ONE_OF) -> HeadFacts:
    return HeadFacts(pooling=Pooling.FIRST, labels=LABELS, scores=kind)


def judge(kind: ScoreKind = ScoreKind.ONE_OF) -> Session:
    return classifying(texts_head(kind), lambda spec: SCORES)


def tagger(*tags: int) -> Session:
    """The token in front is a person's; the tag of each other one has ln 3 where others have 0."""

    def says(spec: RequestSpec) -> list[float]:
        given = (1, *tags)[: len(spec.prompt_ids)]
        return [1.0986123 if tag == place else 0.0 for tag in given for place in range(len(TAGS))]

    return classifying(HeadFacts(pooling=Pooling.EACH, labels=TAGS), says)


async def answered(session: Session, path: str, **body: Any) -> Any:
    answer = await session.post(path, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def labelled(pairs: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "score": pytest.approx(score, abs=1e-6)} for label, score in pairs]


@pytest.mark.parametrize(
    ("kind", "raw", "expected"),
    [
        (ScoreKind.ONE_OF, False, SHARES),
        (ScoreKind.ANY_OF, False, [("good", 5 / 6), ("fair", 2 / 3), ("bad", 1 / 2)]),
        (ScoreKind.NUMBERS, False, [*zip(LABELS, SCORES, strict=True)][::-1]),
        (ScoreKind.ONE_OF, True, [*zip(LABELS, SCORES, strict=True)][::-1]),
    ],
)
def test_a_text_has_its_labels_best_first(
    kind: ScoreKind, raw: bool, expected: list[tuple[str, float]]
) -> None:
    @in_loop
    async def scene() -> None:
        for path in ("/classify", "/predict"):
            session = judge(kind)
            found = await answered(session, path, inputs="w1 w2", raw_scores=raw)
            assert found == labelled(expected)
            (spec,) = session.world.engine.submitted
            assert (spec.output, spec.pooling) == (OutputKind.SCORES, Pooling.FIRST)
            assert spec.stopping.max_new_tokens == 0

    scene()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"top_k": 2}, SHARES[:2]),
        ({"top_k": 9}, SHARES),
        ({"function_to_apply": "softmax"}, SHARES),
        (
            {"function_to_apply": "sigmoid"},
            [("good", 5 / 6), ("fair", 2 / 3), ("bad", 1 / 2)],
        ),
        (
            {"function_to_apply": "none", "top_k": 1},
            [("good", SCORES[2])],
        ),
    ],
)
def test_hugging_face_s_clients_say_which_labels(
    inside: bool, asked: dict[str, Any], expected: list[tuple[str, float]]
) -> None:
    @in_loop
    async def scene() -> None:
        body = {"parameters": asked} if inside else asked
        for path in ("/classify", "/predict"):
            found = await answered(judge(), path, inputs="w1 w2", **body)
            assert found == labelled(expected)
        (found,) = await answered(judge(), "/classify_batch", inputs=["w1"], **body)
        assert found == labelled(expected)

    scene()


@in_loop
async def test_a_function_is_applied_to_what_tokens_score() -> None:
    (found,) = await answered(tagger(1), "/classify", inputs="w1", function_to_apply="none")
    assert found["score"] == pytest.approx(1.0986123)
    refused = await tagger(1).post("/classify", inputs="w1", top_k=1)
    assert refused.status_code == 422
    assert "`top_k` is for labels of whole texts" in refused.text


@in_loop
async def test_entities_are_tokens_of_one_kind_one_behind_the_other() -> None:
    #        é (unknown), w1: one person; w2: another one; w3: none; w4: a place; w5: a person
    session = tagger(1, 2, 1, 0, 3, 2)
    text = "é w1 w2 w3 w4 w5"
    share = pytest.approx(0.5, abs=1e-6)
    expected = [
        {"entity_group": "PER", "score": share, "word": "é w1", "start": 0, "end": 5},
        {"entity_group": "PER", "score": share, "word": "w2", "start": 6, "end": 8},
        {"entity_group": "LOC", "score": share, "word": "w4", "start": 12, "end": 14},
        {"entity_group": "PER", "score": share, "word": "w5", "start": 15, "end": 17},
    ]
    assert await answered(session, "/classify", inputs=text) == expected
    assert all(
        text.encode()[each["start"] : each["end"]].decode() == each["word"] for each in expected
    )
    batch = await answered(session, "/classify_batch", inputs=[text, "w9", text])
    assert batch == [expected, [{**expected[0], "word": "w9", "end": 2}], expected]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # Seconds: received, valid, scheduled, the end.
        ([(1.0, 1.25, 1.5, 3.0)], [2000, 250, 250, 1500]),
        ([(1.0, 1.5, 1.5, 2.0), (1.0, 1.0, 2.0, 4.0)], [2000, 250, 500, 1250]),
    ],
)
def test_heads_have_lorax_s_times(times: list[tuple[float, ...]], expected: list[int]) -> None:
    results = [
        GenerateResult(
            sequences=(), texts=(), details=False, num_prompt_chars=0, new_parser=OutputParser,
            num_prompt_tokens=1, timings=Timings(
                received_at=received, validated_at=valid, scheduled_at=scheduled,
                first_token_at=end, last_token_at=end,
            ),
        )
        for received, valid, scheduled, end in times
    ]  # fmt: skip
    names = ("x-compute-time", "x-validation-time", "x-queue-time", "x-inference-time")
    assert mean_times(results) == dict(zip(names, map(str, expected), strict=True))


@in_loop
async def test_classes_come_with_times() -> None:
    for path, inputs in (("/classify", "w1"), ("/classify_batch", ["w1", "w2"])):
        answer = await judge().post(path, inputs=inputs)
        assert answer.headers["x-inference-time"].isdecimal()


@in_loop
async def test_a_batch_has_an_answer_for_each_text() -> None:
    session = classifying(texts_head(), lambda spec: [float(spec.prompt_ids[-1]), 0.0, 0.0])
    found = await answered(session, "/classify_batch", inputs=["w8", "w9"], raw_scores=True)
    assert [each[0] for each in found] == [
        {"label": "bad", "score": 8},
        {"label": "bad", "score": 9},
    ]


@in_loop
async def test_pairs_are_read_together() -> None:
    session = judge()
    assert await answered(session, "/predict", inputs=["w1", "w2"]) == labelled(SHARES)
    assert (
        await answered(session, "/predict", inputs=[["w1", "w2"], ["w3"]]) == [labelled(SHARES)] * 2
    )
    assert await answered(session, "/predict", inputs=["w1"]) == labelled(SHARES)
    specs = session.world.engine.submitted
    assert sorted((list(spec.prompt_ids), spec.second_start) for spec in specs) == [
        ([900, 1], 0), ([900, 1, 2], 2), ([900, 1, 2], 2), ([900, 3], 0),
    ]  # fmt: skip


@in_loop
async def test_vllm_s_body_gets_vllm_s_answer() -> None:
    document = await answered(judge(), "/classify", model="fake", input=["w1", "w2 w3"])
    assert document.pop("id").startswith("classify-")
    assert document.pop("created") > 1_700_000_000
    probs = [pytest.approx(share, abs=1e-6) for share in (0.125, 0.25, 0.625)]
    text = {"label": "good", "probs": probs, "num_classes": 3}
    assert document == {
        "object": "list",
        "model": "fake",
        "data": [{"index": 0, **text}, {"index": 1, **text}],
        "usage": {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0},
    }
    raw = await answered(judge(), "/classify", input="w1", activation=False)
    assert raw["data"][0]["probs"] == [pytest.approx(score) for score in SCORES]


@in_loop
async def test_a_text_is_cut_where_that_is_asked_for() -> None:
    session, text = judge(), " ".join(f"w{number}" for number in range(30))
    await answered(session, "/classify", inputs=text, truncate=True)
    await answered(session, "/predict", inputs=text, truncate_prompt_tokens=3)
    assert [list(spec.prompt_ids) for spec in session.world.engine.submitted] == [
        [900, *range(24)],
        [900, 0, 1],
    ]
    session = tagger(*[3] * 30)
    found = await answered(session, "/classify", inputs=text, truncate_prompt_tokens=3)
    assert [each["word"] for each in found] == ["w0 w1"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (
            "/classify",
            {"inputs": "w1 " * 30},
            "at most 25 tokens, got 31; shorten it or set `truncate`",
        ),
        ("/classify", {"inputs": ""}, "`inputs` must not be empty"),
        ("/classify", {}, "send the text as `inputs`"),
        ("/classify", {"inputs": "w1", "input": "w1"}, "and not both"),
        ("/classify", {"inputs": "w1", "truncation_direction": "left"}, "truncation_direction"),
        ("/classify", {"inputs": "w1", "top_k": 0}, "`top_k` must be at least 1, got 0"),
        ("/predict", {"inputs": "w1", "parameters": {"top_k": 0}}, "`top_k` must be at least 1"),
        (
            "/predict",
            {"inputs": "w1", "top_k": 1, "parameters": {"top_k": 1}},
            "beside `parameters`",
        ),
        ("/classify", {"inputs": "w1", "function_to_apply": "tanh"}, "function_to_apply"),
        (
            "/classify",
            {"inputs": "w1", "function_to_apply": "none", "raw_scores": True},
            "send one of them",
        ),
        ("/classify", {"input": "w1", "top_k": 1}, "of `input` all labels are told"),
        ("/classify_batch", {"inputs": []}, "`inputs` must not be empty"),
        ("/classify_batch", {"inputs": ["w1", ""]}, "number 1 is one"),
        ("/classify_batch", {"inputs": ["w1"] * 2049}, "at most 2048 texts"),
        ("/predict", {"inputs": []}, "one or two texts in each list"),
        ("/predict", {"inputs": ["w1", "w2", "w3"]}, "one or two texts in each list"),
        ("/predict", {"inputs": [["w1"], []]}, "one or two texts in each list"),
    ],
)
def test_faults_are_said(path: str, body: dict[str, Any], words: str) -> None:
    @in_loop
    async def scene() -> None:
        session = judge()
        answer = await session.post(path, **body)
        assert answer.status_code in (400, 422), answer.text
        assert words in answer.json()["error"]
        assert not session.world.engine.submitted

    scene()


@in_loop
async def test_a_model_without_the_head_says_what_to_do() -> None:
    for path in ("/classify", "/predict"):
        session = Session(World())
        answer = await session.post(path, inputs="w1")
        assert answer.status_code == 422
        assert (
            "this model does not have a classification head: name an adapter"
            in answer.json()["error"]
        )
        assert not session.world.engine.submitted
    answer = await tagger(1).post("/predict", inputs="w1")
    assert answer.status_code == 422
    assert "one for tokens, not for whole texts" in answer.json()["error"]
    answer = await tagger(1).post("/classify", input="w1")
    assert answer.status_code == 422
    assert "send `inputs` to `/classify`" in answer.json()["error"]
