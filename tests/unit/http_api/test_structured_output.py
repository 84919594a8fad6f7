"""``response_format`` on LoRAX's routes: what reaches the engine, and what never does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.helpers.http_app import World
from tests.helpers.tiny_models import make_tokenizer

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.step import RequestSpec
from lorax_router.service.constraints.readiness import Constraints

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return str(folder / "tokenizer.json")


def ask(
    tokenizer_file: str, path: str = "/generate", **params: Any
) -> tuple[httpx.Response, list[RequestSpec], list[Constraint]]:
    """Return the answer, what the engine got, and what the shards were to get ready."""
    prepared: list[Constraint] = []

    async def prepare(constraint: Constraint, content: object) -> None:
        prepared.append(constraint)

    async def run() -> tuple[httpx.Response, list[RequestSpec], list[Constraint]]:
        constraints = Constraints(prepare, tokenizer_file)
        world = World(constraints=constraints)
        try:
            async with world.client() as client:
                body = {"inputs": "w1", "parameters": params}
                return await client.post(path, json=body), world.engine.submitted, prepared
        finally:
            await constraints.close()

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_schema_reaches_the_engine_as_a_grammar_that_the_shards_are_ready_for(
    tokenizer_file, path
):
    asked = {"type": "json_object", "schema": SCHEMA}
    response, submitted, prepared = ask(tokenizer_file, path, response_format=asked)
    assert response.status_code == 200, response.text
    assert [spec.constraint for spec in submitted] == prepared
    (constraint,) = prepared
    assert constraint.kind is ConstraintKind.LLGUIDANCE
    (grammar,) = json.loads(constraint.text)["grammars"]
    assert grammar["json_schema"]["properties"] == SCHEMA["properties"]


def test_each_of_several_sequences_is_bound(tokenizer_file):
    asked = {"type": "json_object", "schema": SCHEMA}
    params = {"response_format": asked, "best_of": 2, "do_sample": True}
    response, submitted, prepared = ask(tokenizer_file, **params)
    assert response.status_code == 200, response.text
    assert [spec.constraint for spec in submitted] == prepared * 2


def test_a_request_without_one_asks_nobody(tokenizer_file):
    _, submitted, prepared = ask(tokenizer_file)
    assert [spec.constraint for spec in submitted] == [None]
    assert prepared == []


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#"}, "no value of it ends"),
        ({"type": "nonsense"}, "response_format"),
    ],
)
def test_w4_a_schema_that_cannot_be_compiled_is_a_422_and_reaches_no_batch(
    tokenizer_file, path, schema, words
):
    """LoRAX finds out within a batch, which ends with it."""
    asked = {"type": "json_object", "schema": schema}
    response, submitted, prepared = ask(tokenizer_file, path, response_format=asked)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert "`response_format`" in response.json()["error"]
    assert words in response.json()["error"]
    assert (submitted, prepared) == ([], [])
