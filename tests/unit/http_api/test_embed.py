"""LoRAX's `/embed`, as its client calls it."""

from __future__ import annotations

import numpy as np
import pytest
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session

from lorax_contract.pooling import VectorFacts
from lorax_contract.step import OutputKind
from lorax_router.service.abilities import Abilities


@in_loop
async def test_a_text_has_a_vector_of_length_one() -> None:
    session = Session()
    answer = await session.post("/embed", inputs="w1 w2", parameters=None, stream=False)
    assert answer.status_code == 200, answer.text
    expected = np.array([900, 2, 3, 0]) / np.linalg.norm([900, 2, 3, 0])
    assert answer.json() == {"embeddings": pytest.approx(expected.tolist())}
    assert [spec.output for spec in session.world.engine.submitted] == [OutputKind.VECTOR]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": "w1", "stream": True}, "`stream`"),
        ({"inputs": ""}, "`inputs`"),
        ({"inputs": "w1 " * 30}, "at most 20 tokens"),
        ({"inputs": "w1", "parameters": {"adapter_id": "a"}}, "the base model only"),
    ],
)
def test_faults_are_said(body: dict[str, object], words: str) -> None:
    @in_loop
    async def scene() -> None:
        answer = await Session().post("/embed", **body)
        assert answer.status_code in (400, 422)
        assert words in answer.json()["error"]

    scene()


def unit(*values: float) -> list[float]:
    return (np.array(values) / np.linalg.norm(values)).tolist()


@in_loop
async def test_several_texts_have_a_list_of_vectors_as_tei_answers() -> None:
    session = Session()
    answer = await session.post("/embed", inputs=["w1 w2", "w3"])
    expected = [unit(900, 2, 3, 0), unit(900, 3, 2, 0)]
    assert answer.json() == [pytest.approx(each) for each in expected]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate": False}, unit(900, 2, 3, 0)),
        ({"normalize": False}, [900, 2, 3, 0]),
        ({"normalize": True, "dimensions": 2}, unit(900, 2)),
        ({"truncate": True, "truncation_direction": "Right"}, unit(900, 2, 3, 0)),
    ],
)
def test_who_speaks_tei_s_words_gets_a_list_for_one_text_too(
    fields: dict[str, object], expected: list[float]
) -> None:
    @in_loop
    async def scene() -> None:
        answer = await Session().post("/embed", inputs="w1 w2", **fields)
        assert answer.json() == [pytest.approx(expected)], answer.text

    scene()


@in_loop
async def test_texts_are_prompted_by_name_and_cut_where_that_is_asked_for() -> None:
    facts = VectorFacts(size=4, prompts=(("query", "w7 "),))
    session = Session(World(abilities=Abilities(vectors=facts)))
    long = " ".join(f"w{number}" for number in range(30))
    assert (await session.post("/embed", inputs=[long], truncate=True)).status_code == 200
    assert (await session.post("/embed", inputs="w1", prompt_name="query")).status_code == 200
    prompts = [list(spec.prompt_ids) for spec in session.world.engine.submitted]
    assert prompts == [[900, *range(19)], [900, 7, 1]]
    for fields, words in (
        ({"prompt_name": "passage"}, "`prompt_name` must be one of 'query'"),
        ({"dimensions": 5}, "`dimensions` must be at most the model's 4, got 5"),
        ({"inputs": [long]}, "at most 20 tokens, got 31; shorten it or set `truncate`"),
        ({"inputs": []}, "`inputs` must not be empty"),
        ({"truncation_direction": "left"}, "truncation_direction"),
    ):
        answer = await session.post("/embed", **{"inputs": "w1", **fields})
        assert answer.status_code in (400, 422)
        assert words in answer.json()["error"]
