"""Adapters that act from their invocation in a prompt on (aLoRA), from the request to the shards."""

from __future__ import annotations

from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched
from tests.helpers.in_loop import in_loop

from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt

SHARED = " ".join(f"w{number % 90 + 1}" for number in range(64))
INVOCATION = "w95 w96"


def invoke(world: AdapterWorld, *names: str) -> None:
    """Let adapters be invoked by INVOCATION."""
    for name in names:
        world.sources.contents[name] = fetched(name, invocation_ids=(95, 96))


def request(adapter: str | None, text: str) -> GenerateRequest:
    """A request for three tokens."""
    parameters = GenerateParameters(
        adapter_id=adapter, adapter_source="local", max_new_tokens=3, ignore_eos_token=True
    )
    return GenerateRequest(prompt=TextPrompt(text), parameters=parameters)


@in_loop
async def test_what_comes_before_the_invocation_is_shared_and_the_last_one_counts():
    """The shard refuses a block that another computes."""
    async with adapter_world() as world:
        invoke(world, "one", "two")
        generate = world.parts.service.generate
        await generate(request(None, f"{SHARED} w1"))
        for adapter in ("one", "two"):
            for text in (f"{SHARED} {INVOCATION} w2", f"{INVOCATION} {SHARED[3:]} {INVOCATION}"):
                result = await generate(request(adapter, text))
                assert result.adapter is not None
                assert result.adapter.warning == ""
                shares = text.startswith("w1") or adapter == "two"
                assert result.num_cached_tokens == (64 if shares else 0)


@in_loop
async def test_a_prompt_without_the_invocation_is_the_bases_and_the_caller_is_told():
    """In the head of LoRAX's answers, which has room for it."""
    async with adapter_world() as world:
        invoke(world, "one")
        await world.parts.service.generate(request(None, f"{SHARED} w1"))
        told = []
        for end in ("w1", f"w1 {INVOCATION}"):
            parameters = {"adapter_id": "one", "adapter_source": "local", "max_new_tokens": 2}
            body = {"inputs": f"{SHARED} {end}", "parameters": parameters}
            answer = await world.client.post("/generate", json=body)
            assert answer.status_code == 200
            told.append(answer.headers.get("x-adapter-warning"))
        assert "none of the adapter's invocation tokens" in told[0]
        assert told[1] is None
        stats = world.parts.engine._scheduler.stats()
        assert stats.num_cached_tokens == 2 * 64


@in_loop
async def test_all_answers_to_one_prompt_are_the_adapters():
    """Each sequence begins where the first one does."""
    async with adapter_world() as world:
        invoke(world, "one")
        parameters = GenerateParameters(
            adapter_id="one", adapter_source="local", max_new_tokens=3, best_of=2, do_sample=True,
            ignore_eos_token=True,
        )  # fmt: skip
        prompt = TextPrompt(f"{SHARED} {INVOCATION} w3")
        await world.parts.service.generate(GenerateRequest(prompt=prompt, parameters=parameters))
        stats = world.parts.engine._scheduler.stats()
        assert stats.num_cached_tokens == 64
        # The base computed none of the last block, and all of the others.
        await world.parts.service.generate(request(None, f"{SHARED} w1"))
        assert world.parts.engine._scheduler.stats().num_cached_tokens == 2 * 64
