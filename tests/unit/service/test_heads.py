"""Classification by adapters with heads of their own, over a fake shard: whose head, which scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.helpers.adapter_world import HEADS, AdapterWorld, adapter_world, fetched
from tests.helpers.in_loop import in_loop

from lorax_contract.errors import ValidationError
from lorax_contract.pooling import HeadFacts, Pooling
from lorax_contract.step import OutputKind, RequestSpec
from lorax_router.service.labels import scores_of
from lorax_router.service.requests import GenerateRequest, TextPrompt
from lorax_router.service.results import GenerateResult
from lorax_router.shards.fake.model import digest_of, key_of
from lorax_router.shards.fake.shard import FakeModel, FakeShard

MODEL = FakeModel(vocab_size=900, eos_token_ids=frozenset())
OWN = HeadFacts(pooling=Pooling.FIRST, labels=("no", "yes"))


def with_head(head: HeadFacts | None) -> FakeShard:
    return FakeShard(
        MODEL, num_blocks=400, facts={"head": head, "is_encoder": True, "generates": False}
    )


def asked(world: AdapterWorld, adapter: str | None, text: str = "w1 w2") -> GenerateRequest:
    request = world.request(adapter, output=OutputKind.SCORES)
    parameters = replace(request.parameters, max_new_tokens=None, ignore_eos_token=False)
    return replace(request, prompt=TextPrompt(text), parameters=parameters)


async def classified(world: AdapterWorld, adapter: str | None, text: str) -> GenerateResult:
    return await world.parts.service.generate(asked(world, adapter, text))


def specs_of(shard: FakeShard) -> list[RequestSpec]:
    return [new.spec for step in shard.steps for new in step.new_rows]


def expected(spec: RequestSpec, head: HeadFacts) -> Any:
    """The softmax of what a fake head gives for a prompt, by the fake's own rules, token by token."""
    digest = digest_of(key_of(token, place) for place, token in enumerate(spec.prompt_ids))
    raw = np.frombuffer(MODEL.scores(spec, digest, head), dtype="<f4").astype(float)
    rows = np.exp(raw).reshape(-1, len(head.labels))
    shares = rows / rows.sum(axis=1, keepdims=True)
    return shares if head.classifies_tokens else shares[0]


@pytest.mark.parametrize(
    ("facts", "task", "tasks", "tag"),
    [
        ({}, "generate", ["generate", "embed"], "text-generation"),
        ({"generates": False}, "embed", ["embed"], "feature-extraction"),
        ({"generates": False, "is_encoder": True}, "embed", ["embed"], "feature-extraction"),
        (
            {"generates": False, "head": OWN},
            "classify",
            ["embed", "classify"],
            "text-classification",
        ),
        (
            {"generates": False, "head": HEADS["tagger"]},
            "token-classify",
            ["embed", "classify"],
            "token-classification",
        ),
    ],
)
def test_a_server_says_what_its_model_does(
    facts: dict[str, Any], task: str, tasks: list[str], tag: str
) -> None:
    @in_loop
    async def scene() -> None:
        async with adapter_world(FakeShard(MODEL, num_blocks=400, facts=facts)) as world:
            told = (await world.client.get("/info")).json()
            head = facts.get("head")
            assert told["task"] == task
            assert (told["tasks"], told["model_pipeline_tag"]) == (tasks, tag)
            assert told["labels"] == (None if head is None else list(head.labels))
            answer = await world.client.post("/generate", json={"inputs": "w1"})
            assert answer.status_code == (200 if "generate" in tasks else 422)
            assert (await world.client.get("/startup")).status_code == 200

    scene()


@in_loop
async def test_a_request_gets_the_head_of_its_adapter_or_else_the_model_s() -> None:
    shard = with_head(OWN)
    async with adapter_world(shard) as world:
        for adapter, head in (
            (None, OWN),
            ("judge", HEADS["judge"]),
            ("tagger", HEADS["tagger"]),
            ("plain", OWN),
        ):
            result = await classified(world, adapter, "w1 w2 w3")
            assert result.head == head
            spec = specs_of(shard)[-1]
            assert (spec.output, spec.pooling) == (OutputKind.SCORES, head.pooling)
            np.testing.assert_allclose(scores_of(result), expected(spec, head), atol=1e-6)
            tells = [(0, 0), (0, 2), (3, 5), (6, 8)] if head.classifies_tokens else None
            assert result.spans == tells
            assert (
                await world.parts.service.head_of(
                    replace(
                        asked(world, adapter),
                        parameters=replace(
                            asked(world, adapter).parameters, output=OutputKind.VECTOR
                        ),
                    )
                )
                == head
            )


@in_loop
async def test_who_has_no_head_is_told_before_anything_is_computed() -> None:
    shard = FakeShard(MODEL, num_blocks=400)
    async with adapter_world(shard) as world:
        with pytest.raises(ValidationError, match="this model does not have a classification head"):
            await classified(world, None, "w1")
        with pytest.raises(ValidationError, match="neither this model nor the adapter has"):
            await classified(world, "plain", "w1")
        assert not specs_of(shard)
        result = await classified(world, "judge", "w1")
        assert result.head == HEADS["judge"]


@in_loop
async def test_an_adapter_that_is_replaced_by_one_with_other_labels_has_those() -> None:
    async with adapter_world(with_head(None)) as world:
        other = HeadFacts(pooling=Pooling.LAST, labels=("x", "y"))
        world.sources.contents["a"] = fetched("first", head=HEADS["judge"], valid_s=0.0)
        assert (await classified(world, "a", "w1")).head == HEADS["judge"]
        world.sources.contents["a"] = fetched("second", head=other, valid_s=0.0)
        await world.post("reload", adapter_id="a")
        assert (await classified(world, "a", "w1")).head == other
