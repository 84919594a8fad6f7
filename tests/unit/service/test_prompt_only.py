"""Requests that ask for their prompt alone, through the inference service."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.helpers.http_app import World
from tests.helpers.scripted_engine import ScriptedEngine

from lorax_contract.errors import IncompleteGenerationError
from lorax_contract.step import FinishCode, OutputKind, TokenColumns
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt


def request(**params: Any) -> GenerateRequest:
    parameters = GenerateParameters(**params)
    return GenerateRequest(prompt=TextPrompt("w1 w2"), parameters=parameters)


def test_a_prompt_alone_is_answered_without_a_token():
    async def run() -> None:
        world = World()
        asked = request(output=OutputKind.PROMPT, decoder_input_details=True)
        result = await world.service.generate(asked)
        (sequence,) = result.sequences
        assert (sequence.num_generated, sequence.finish_reason) == (0, "length")
        assert result.texts == ("",)
        assert sequence.prompt_tokens is not None
        assert sequence.prompt_tokens.ids == world.engine.submitted[0].prompt_ids
        t = result.timings
        moments = [t.received_at, t.validated_at, t.scheduled_at, t.last_token_at]
        assert moments == sorted(moments)
        assert t.total_s > 0
        assert world.metric("lorax_request_success_total") == 1
        # There is no first token, and no time per token.
        assert world.metric("lorax_request_time_to_first_token_duration_count") == 0
        assert world.metric("lorax_request_mean_time_per_token_duration_count") == 0

    asyncio.run(run())


def test_a_prompt_alone_may_be_streamed():
    async def run() -> None:
        world = World()
        stream = await world.service.generate_stream(request(output=OutputKind.PROMPT))
        async with stream:
            ((sequence, chunk),) = [each async for each in stream]
        assert (sequence, chunk.tokens.ids, chunk.finish) == (0, [], FinishCode.LENGTH)
        assert stream.num_generated == 0
        assert world.metric("lorax_request_success_total") == 1

    asyncio.run(run())


def test_a_last_chunk_without_a_token_is_a_fault_where_tokens_were_asked_for():
    async def run() -> None:
        last = TokenChunk(TokenColumns(), FinishCode.LENGTH, generated_text="")
        world = World(engine=ScriptedEngine(lambda spec: iter([last])))
        with pytest.raises(IncompleteGenerationError):
            await world.service.generate(request())
        first = TokenChunk(TokenColumns([7], [-1.0], ["a"], [False]))
        world.engine.script = lambda spec: iter([first, last])
        with pytest.raises(IncompleteGenerationError):
            await world.service.generate(request())

    asyncio.run(run())
