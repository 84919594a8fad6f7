"""A model that generates nothing: each dialect refuses in words, before anything is computed."""

from __future__ import annotations

import pytest
from tests.helpers.dialects import DIALECTS, Dialect
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop
from tests.helpers.openai_world import Session

from lorax_contract.pooling import HeadFacts, Pooling
from lorax_contract.step import OutputKind
from lorax_router.service.abilities import Abilities

HEAD = HeadFacts(pooling=Pooling.FIRST, labels=("bad", "good"))


def encoder(head: HeadFacts | None = None) -> Session:
    return Session(World(model_id="fake", abilities=Abilities(generates=False, head=head)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_to_generate_is_refused(dialect: Dialect, stream: bool) -> None:
    @in_loop
    async def scene() -> None:
        session = encoder()
        path, body = dialect.asked({}, stream=stream)
        answer = await session.post(path, **body)
        fault = dialect.fault(answer)
        assert fault.status == dialect.refused
        assert "this model generates no text: it makes vectors of texts" in fault.text
        assert "/v1/embeddings" in fault.text
        assert not session.world.engine.submitted

    scene()


@in_loop
async def test_a_prompt_is_not_scored_either() -> None:
    body = {"prompt": "w1", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = await encoder(HEAD).post("/v1/completions", **body)
    assert answer.status_code == 400
    assert "it makes vectors of texts and classifies them" in answer.json()["error"]["message"]


@in_loop
async def test_vectors_and_probes_are_served() -> None:
    session = encoder()
    assert (await session.post("/embed", inputs="w1")).status_code == 200
    async with session.world.client() as client:
        assert (await client.get("/startup")).status_code == 200
    assert [spec.output for spec in session.world.engine.submitted] == [OutputKind.VECTOR] * 2


@in_loop
async def test_texts_are_cut_where_that_is_asked_for() -> None:
    session = encoder()
    long = " ".join(f"w{number}" for number in range(30))
    for most, expected in ((-1, list(range(19))), (3, [0, 1])):
        answer = await session.post("/v1/embeddings", input=long, truncate_prompt_tokens=most)
        assert answer.status_code == 200, answer.text
        assert session.world.engine.submitted[-1].prompt_ids == [900, *expected]
    answer = await session.post("/v1/embeddings", input=[[5, 6, 7]], truncate_prompt_tokens=2)
    assert session.world.engine.submitted[-1].prompt_ids == [5, 6]
    for most, words in (
        (0, "`truncate_prompt_tokens` must be -1 or at least 1"),
        (21, "`truncate_prompt_tokens` must be from 1 to 20"),
        (None, "`input` must have at most 20 tokens, got 31; shorten it or set `truncate_prompt"),
    ):
        answer = await session.post("/v1/embeddings", input=long, truncate_prompt_tokens=most)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
