"""`/v1/embeddings`: inputs of all kinds, formats, dimensions, length one, faults in words."""

from __future__ import annotations

import base64
import struct
from typing import Any

import numpy as np
import pytest
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session

from lorax_contract.pooling import Pooling, VectorFacts
from lorax_contract.step import OutputKind
from lorax_router.service.abilities import Abilities

PATH = "/v1/embeddings"


async def embed(session: Session, **body: Any) -> dict[str, Any]:
    answer = await session.post(PATH, **{"input": "w1 w2", "model": "tests/tiny", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refused(**body: Any) -> str:
    answer = await Session(World(max_body_bytes=100_000)).post(PATH, **{"input": "w1 w2", **body})
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


def unit(*values: float) -> list[float]:
    return (np.array(values) / np.linalg.norm(values)).tolist()


@in_loop
async def test_an_answer_has_what_sdks_read() -> None:
    session = Session()
    document = await embed(session)
    (vector,) = (each.pop("embedding") for each in document["data"])
    assert document == {
        "object": "list", "data": [{"object": "embedding", "index": 0}], "model": "tests/tiny",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }  # fmt: skip
    assert vector == pytest.approx(unit(900, 2, 3, 0))
    (spec,) = session.world.engine.submitted
    assert (spec.output, spec.pooling) == (OutputKind.VECTOR, Pooling.LAST)
    assert spec.stopping.max_new_tokens == 0


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("w1 w2", [[900, 1, 2]]),
        (["w1", "w2"], [[900, 1], [900, 2]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_an_input_is_a_text_or_ids_or_several(given: Any, ids: list[list[int]]) -> None:
    @in_loop
    async def scene() -> None:
        document = await embed(Session(), input=given)
        assert [each["index"] for each in document["data"]] == list(range(len(ids)))
        expected = [unit(each[0], each[-1], len(each), 0) for each in ids]
        found = [each["embedding"] for each in document["data"]]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert document["usage"]["prompt_tokens"] == sum(map(len, ids))

    scene()


@in_loop
async def test_base64_is_float32_and_says_the_same() -> None:
    session = Session()
    plain = (await embed(session))["data"][0]["embedding"]
    raw = base64.b64decode((await embed(session, encoding_format="base64"))["data"][0]["embedding"])
    assert list(struct.unpack("<4f", raw)) == pytest.approx(plain)


@in_loop
async def test_vectors_are_cut_before_they_get_length_one() -> None:
    session = Session()
    for body, expected in (
        ({"dimensions": 2}, unit(900, 2)),
        ({"dimensions": 4}, unit(900, 2, 3, 0)),
        ({"normalize": False}, [900, 2, 3, 0]),
        ({"normalize": False, "dimensions": 1, "pooling": "mean"}, [900]),
        ({"normalize": None, "pooling": "mean"}, unit(900, 2, 3, 1)),
    ):
        (each,) = (await embed(session, **body))["data"]
        assert each["embedding"] == pytest.approx(expected), body


@in_loop
async def test_a_call_of_many_texts_takes_few_places_at_a_time() -> None:
    session = Session(World(max_concurrent_requests=40))
    texts = [f"w{number}" for number in range(200)]
    document = await embed(session, input=texts)
    assert [each["embedding"][0] for each in document["data"]] == pytest.approx(
        [unit(900, number, 2, 0)[0] for number in range(200)]
    )


@in_loop
async def test_faults_are_said() -> None:
    assert "`dimensions` must be at most the model's 4, got 5" in await refused(dimensions=5)
    assert "`dimensions` must be at least 1" in await refused(dimensions=0)
    assert "`input` must not be empty" in await refused(input=[])
    assert "at most 2048 texts" in await refused(input=["w1"] * 2049)
    assert "must have at most 20 tokens" in await refused(input="w1 " * 30)
    assert "`encoding_format`" in await refused(encoding_format="int8")
    assert "`pooling`" in await refused(pooling="each")
    assert "this model has no prompts" in await refused(prompt_name="query")
    assert "`stop`" in await refused(stop="w1")


MADE_FOR = VectorFacts(
    size=4,
    pooling=Pooling.MEAN,
    normalize=False,
    prompts=(("query", "w7 w8 "), ("document", "")),
    default_prompt="w9 ",
)


def made_session() -> Session:
    return Session(World(abilities=Abilities(vectors=MADE_FOR)))


@in_loop
async def test_vectors_are_as_the_model_was_made_for_where_nothing_else_is_said() -> None:
    session = made_session()
    for body, expected in (
        ({}, [900, 2, 4, Pooling.MEAN]),
        ({"normalize": True}, unit(900, 2, 4, Pooling.MEAN)),
        ({"pooling": "last", "dimensions": 3}, [900, 2, 4]),
        ({"prompt_name": "query"}, [900, 2, 5, Pooling.MEAN]),
        ({"prompt_name": "document"}, [900, 2, 3, Pooling.MEAN]),
        ({"input": [5, 6]}, [5, 6, 2, Pooling.MEAN]),
    ):
        (each,) = (await embed(session, **body))["data"]
        assert each["embedding"] == pytest.approx(expected), body
    prompts = [list(spec.prompt_ids) for spec in session.world.engine.submitted]
    assert prompts[0] == [900, 9, 1, 2]
    assert prompts[3] == [900, 7, 8, 1, 2]


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("last", Pooling.LAST),
        ("mean", Pooling.MEAN),
        ("cls", Pooling.FIRST),
        ("max", Pooling.MAX),
        ("mean_sqrt_len", Pooling.MEAN_SQRT),
        ("weightedmean", Pooling.WEIGHTED_MEAN),
    ],
)
def test_each_pooling_has_a_name(name: str, pooling: Pooling) -> None:
    @in_loop
    async def scene() -> None:
        session = made_session()
        await embed(session, pooling=name)
        assert [spec.pooling for spec in session.world.engine.submitted] == [pooling]

    scene()


@in_loop
async def test_what_the_model_was_not_made_for_is_refused_before_anything_is_computed() -> None:
    session = made_session()
    for body, words in (
        ({"dimensions": 5}, "at most the model's 4, got 5"),
        ({"prompt_name": "passage"}, "`prompt_name` must be one of 'query', 'document'"),
        ({"prompt_name": "query", "input": [5]}, "goes with texts"),
    ):
        answer = await session.post(PATH, **{"input": "w1", **body})
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    assert not session.world.engine.submitted
