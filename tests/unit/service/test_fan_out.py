"""One text through several adapters in one call: an answer of each, and the text tokenized once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.helpers.adapter_world import HEADS, AdapterWorld, adapter_world, fetched
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_contract.errors import QuotaError, ValidationError
from lorax_contract.pooling import HeadFacts
from lorax_contract.step import RequestSpec
from lorax_router.http_api.fan_out import MAX_ADAPTERS
from lorax_router.service.batch import generate_apart
from lorax_router.service.callers import Caller, Quotas
from lorax_router.service.prompts.encoding import EncodedText, TextToEncode
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool
from lorax_router.service.requests import BASE_MODEL_ADAPTER_ID
from lorax_router.service.results import GenerateResult
from lorax_router.shards.fake.model import digest_of, key_of
from lorax_router.shards.fake.shard import FakeModel

MODEL = FakeModel(vocab_size=900, eos_token_ids=frozenset())


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenized."""
    found: list[str] = []
    encode = TokenizerPool.encode

    async def noting(self: TokenizerPool, asked: TextToEncode) -> EncodedText:
        found.append(asked.text)
        return await encode(self, asked)

    monkeypatch.setattr(TokenizerPool, "encode", noting)
    return found


def spec_of(world: AdapterWorld, adapter: str | None) -> RequestSpec:
    """The row of an adapter; None: that of the base model."""
    handle = 0 if adapter is None else world.handle(adapter)
    specs = [new.spec for step in world.shard.steps for new in step.new_rows]
    (found,) = [spec for spec in specs if spec.adapter == handle]
    return found


def digest(spec: RequestSpec) -> int:
    return digest_of(key_of(token, place) for place, token in enumerate(spec.prompt_ids))


def unit_vector(spec: RequestSpec) -> Any:
    vector = np.frombuffer(MODEL.vector(spec, digest(spec)), dtype="<f4").astype(float)
    return pytest.approx((vector / np.linalg.norm(vector)).tolist())


def best(spec: RequestSpec, head: HeadFacts) -> str:
    scores = np.frombuffer(MODEL.scores(spec, digest(spec), head), dtype="<f4")
    return head.labels[int(scores.argmax())]


async def asked(world: AdapterWorld, path: str, **body: Any) -> Any:
    answer = await world.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@in_loop
async def test_each_adapter_classifies_the_text_in_its_own_way(tokenized: list[str]) -> None:
    async with adapter_world() as world:
        world.sources.contents["gone"] = AdapterUnavailableError(
            Reason.NOT_FOUND, "no such adapter"
        )
        names = ["judge", "gone", "tagger", "plain", "ranker"]
        found = await asked(
            world, "/classify", inputs="w1 w2", adapters=names, adapter_source="local"
        )
        assert [each["adapter_id"] for each in found] == names
        assert [sorted({*each} - {"adapter_id"}) for each in found] == [
            ["labels"], ["error", "error_type"], ["entities"], ["error", "error_type"], ["labels"],
        ]  # fmt: skip
        assert "no such adapter" in found[1]["error"]
        assert "a classification head" in found[3]["error"]
        labels = found[0]["labels"]
        assert labels[0]["label"] == best(spec_of(world, "judge"), HEADS["judge"])
        assert sum(each["score"] for each in labels) == pytest.approx(1)
        # Where tokens stand is found out for one head, and not for the others.
        assert tokenized == ["w1 w2"] * 2


@in_loop
async def test_each_adapter_makes_its_own_vector_and_the_text_is_tokenized_once(
    tokenized: list[str],
) -> None:
    async with adapter_world(default_adapter_source="local") as world:
        names = ["a", BASE_MODEL_ADAPTER_ID, "b", "c"]
        found = await asked(world, "/embed", inputs="w1 w2", adapters=names)
        rows = ["a", None, "b", "c"]
        assert found == [
            {"adapter_id": name, "embeddings": unit_vector(spec_of(world, row))}
            for name, row in zip(names, rows, strict=True)
        ]
        assert tokenized == ["w1 w2"]
        # The next call's text is its own.
        several = await asked(world, "/embed", inputs=["w1 w2", "w3"], adapters=["a", "b"])
        assert [each["embeddings"][0] for each in several] == [
            pytest.approx(found[place]["embeddings"]) for place in (0, 2)
        ]
        assert sorted(tokenized) == ["w1 w2", "w1 w2", "w3"]


@in_loop
async def test_vectors_in_openai_s_shape_through_adapters() -> None:
    async with adapter_world(default_adapter_source="local") as world:
        world.sources.contents["gone"] = AdapterUnavailableError(
            Reason.NOT_FOUND, "no such adapter"
        )
        found = await asked(world, "/v1/embeddings", input=["w1", "w2 w3"], adapters=["a", "gone"])
        assert [each["adapter_id"] for each in found] == ["a", "gone"]
        first, second = found
        assert [each["index"] for each in first["data"]] == [0, 1]
        assert (first["model"], first["usage"]["prompt_tokens"]) == ("a", 5)
        assert "no such adapter" in second["error"]["message"]
        labels = await asked(world, "/classify", input="w1", adapters=["judge", "tagger"])
        assert labels[0]["data"][0]["num_classes"] == 3
        assert "one for tokens" in labels[1]["error"]


@in_loop
async def test_each_adapter_generates_its_own_text(tokenized: list[str]) -> None:
    async with adapter_world(default_adapter_source="local") as world:
        world.sources.contents["gone"] = AdapterUnavailableError(
            Reason.NOT_FOUND, "no such adapter"
        )
        options = {"max_new_tokens": 3, "details": True}
        names = ["a", "gone", BASE_MODEL_ADAPTER_ID, "b"]
        found = await asked(world, "/generate", inputs="w1 w2", parameters=options, adapters=names)
        assert [each["adapter_id"] for each in found] == names
        assert "no such adapter" in found[1]["error"]
        assert tokenized == ["w1 w2"]
        for place, name in ((0, "a"), (3, "b")):
            alone = await asked(
                world, "/generate", inputs="w1 w2", parameters=options | {"adapter_id": name}
            )
            alone["details"]["seed"] = found[place]["details"]["seed"]
            assert found[place] == {"adapter_id": name, **alone}


@in_loop
async def test_what_a_call_is_answered_with_at_once_has_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with adapter_world(default_adapter_source="local") as world:
        world.sources.contents["gone"] = AdapterUnavailableError(
            Reason.NOT_FOUND, "no such adapter"
        )
        names = ["a", "gone", BASE_MODEL_ADAPTER_ID, "b"]
        # The adapters come at different times.
        await asked(world, "/embed", inputs="w1 w2", adapters=names)
        caplog.set_level("INFO", "lorax_router.request")
        caplog.clear()
        await asked(world, "/embed", inputs="w1 w2", adapters=names)
        await asked(world, "/embed", inputs=["w1 w2"], adapters=["a"])
        records = [each for each in caplog.records if each.name == "lorax_router.request"]
        refused, of_all, alone = (each.fields for each in records)  # type: ignore[attr-defined]
        assert (refused["outcome"], refused["adapter"]) == ("download_adapter", "gone")
        assert (of_all["adapters"], of_all["requests"]) == (["a", BASE_MODEL_ADAPTER_ID, "b"], 3)
        assert of_all["prompt_tokens"] == 3 * alone["prompt_tokens"]
        assert "adapter" not in of_all
        assert (alone["adapter"], "requests" in alone) == ("a", False)


@in_loop
async def test_those_that_are_known_are_in_one_step_whatever_others_wait_for() -> None:
    async with adapter_world(default_adapter_source="local") as world:
        names = ["a", "b", "c"]
        first = await asked(world, "/embed", inputs="w1", adapters=names)
        num_steps = len(world.shard.steps)
        coming = asyncio.get_running_loop().create_future()
        world.sources.contents["late"] = coming
        body = {"inputs": "w1", "adapters": ["a", "late", "b", "c"]}
        calling = asyncio.create_task(asked(world, "/embed", **body))
        await until(lambda: any(step.new_rows for step in world.shard.steps[num_steps:]))
        (step,) = [step for step in world.shard.steps[num_steps:] if step.new_rows]
        assert [new.spec.adapter for new in step.new_rows] == [world.handle(each) for each in names]
        assert not calling.done()
        coming.set_result(fetched("late"))
        found = await calling
        assert [found[place] for place in (0, 2, 3)] == first
        assert found[1]["adapter_id"] == "late"


@in_loop
async def test_each_adapter_is_a_request_to_quotas() -> None:
    caller = Caller(tenant="acme", quotas=Quotas(requests_per_minute=2))
    async with adapter_world() as world:
        request = replace(world.request(None), caller=caller)
        found = await world.parts.service.generate_through(request, ["a", "b", "c"])
        assert [type(each) for each in found] == [GenerateResult, GenerateResult, QuotaError]


@pytest.mark.parametrize("at_once", [1, 2, 5, 64])
@in_loop
async def test_calls_of_more_than_may_be_in_the_house_come_in_parts(at_once: int) -> None:
    """Once an adapter has failed, no other text goes through it."""
    in_house: list[int] = []
    asked_of: list[str] = []

    class Counting:
        async def generate_through(self, request: Any, adapters: list[str]) -> list[Any]:
            in_house.append((in_house[-1] if in_house else 0) + len(adapters))
            asked_of.extend(adapters)
            await asyncio.sleep(0)
            in_house.append(in_house[-1] - len(adapters))
            failed = ValidationError("broken")
            return [failed if each == "bad" else (request, each) for each in adapters]

    names = ["a", "bad", "b"]
    found = await generate_apart(Counting(), [1, 2, 3, 4], names, at_once)  # type: ignore[arg-type, list-item]
    assert found[0] == [(each, "a") for each in (1, 2, 3, 4)]
    assert isinstance(found[1], ValidationError)
    assert found[2] == [(each, "b") for each in (1, 2, 3, 4)]
    assert max(in_house) <= at_once
    assert asked_of.count("bad") <= max(1, -(-at_once // len(names)))


@in_loop
async def test_streams_are_of_one_adapter() -> None:
    async with adapter_world(default_adapter_source="local") as world:
        body = {"inputs": "w1", "adapters": ["a", "b"]}
        for path in ("/generate_stream", "/"):
            answer = await world.client.post(path, json=body)
            assert answer.status_code == 422, answer.text
            assert "adapters" in answer.json()["error"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"adapters": []}, "`adapters` must name an adapter or more"),
        ({"adapters": ["a", ""]}, "`adapters` must name an adapter or more"),
        ({"adapters": ["a"], "adapter_id": "b"}, "`adapters` and another field name adapters"),
        ({"adapters": ["a"], "parameters": {"adapter_id": "b"}}, "and another field"),
        ({"adapters": ["a"] * (MAX_ADAPTERS + 1)}, f"at most {MAX_ADAPTERS} adapters"),
        ({"adapters": ["a"] * 200, "inputs": ["w1"] * 20}, "20 texts through 200 adapters"),
    ],
)
def test_what_adapters_cannot_be_is_said(fields: dict[str, Any], words: str) -> None:
    @in_loop
    async def scene() -> None:
        async with adapter_world(default_adapter_source="local") as world:
            answer = await world.client.post("/embed", json={"inputs": "w1", **fields})
            assert answer.status_code == 422
            assert words in answer.json()["error"]

    scene()
