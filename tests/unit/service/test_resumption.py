"""An answer goes on where another server's ended: nothing is missing in it, nothing twice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched
from tests.helpers.in_loop import in_loop

from lorax_contract.errors import GenerationError, ValidationError
from lorax_contract.step import FinishCode
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.requests import GenerateRequest, Resumption

NUM = 12
WAYS = [{}, {"do_sample": True, "seed": 7, "temperature": 0.8}, {"return_k_alternatives": 2}]


async def chunks_of(world: AdapterWorld, request: GenerateRequest, most: int = NUM) -> list[Any]:
    """The first chunks of a stream, and what its adapter was."""
    found: list[TokenChunk] = []
    async with await world.parts.service.generate_stream(request) as stream:
        async for _, chunk in stream:
            found.append(chunk)
            if len(found) == most:
                break
    return [found, stream.adapter_content]


def goes_on(request: GenerateRequest, first: list[TokenChunk], content: str) -> GenerateRequest:
    resumption = Resumption(
        output_ids=[number for chunk in first for number in chunk.tokens.ids],
        adapter_content=content,
    )
    return dataclasses.replace(request, resumption=resumption)


@pytest.mark.parametrize("params", WAYS, ids=["greedy", "drawn", "alternatives"])
@pytest.mark.parametrize("adapter", [None, "poet"])
@in_loop
async def test_the_whole_is_what_one_server_says(
    adapter: str | None, params: dict[str, Any]
) -> None:
    async with adapter_world() as one, adapter_world() as other:
        request = one.request(adapter, NUM, **params)
        whole, content = await chunks_of(one, request)
        assert bool(content) is (adapter is not None)
        assert whole[-1].finish is FinishCode.LENGTH
        for num in (1, NUM // 2, NUM - 1):
            first, _ = await chunks_of(one, request, num)
            rest, _ = await chunks_of(other, goes_on(request, first, content))
            said = [*first, *rest]
            assert [each.tokens for each in said] == [each.tokens for each in whole]
            assert [each.alternatives for each in said] == [each.alternatives for each in whole]
            assert (said[-1].finish, said[-1].generated_text) == (
                whole[-1].finish, whole[-1].generated_text,
            )  # fmt: skip


@in_loop
async def test_another_adapter_of_the_same_name_does_not_go_on() -> None:
    async with adapter_world() as one, adapter_world() as other:
        request = one.request("poet", NUM)
        first, content = await chunks_of(one, request, 3)
        other.sources.contents["poet"] = fetched("another")
        with pytest.raises(GenerationError, match="was replaced"):
            await chunks_of(other, goes_on(request, first, content))


@in_loop
async def test_an_output_that_has_all_its_tokens_does_not_go_on() -> None:
    async with adapter_world() as world:
        request = world.request(None, NUM)
        whole, content = await chunks_of(world, request)
        with pytest.raises(ValidationError, match="has 12 tokens already"):
            await chunks_of(world, goes_on(request, whole, content))
