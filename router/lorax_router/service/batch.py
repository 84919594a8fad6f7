"""Several prompts of one call: requests that are answered together or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Self

from lorax_contract.errors import LoraxError
from lorax_contract.step import FinishCode
from lorax_router.service.beside import all_of
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.generation import AnswerStream, GenerationService
from lorax_router.service.merge import Merge
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.results import GenerateResult


async def generate_each(
    service: GenerationService, requests: Sequence[GenerateRequest], at_once: int | None = None
) -> list[GenerateResult]:
    """Return the answers, in order; the first request that fails ends the others.

    ``at_once``: so many are in the house at a time, for calls of more requests than fit; None: all.
    """
    room = asyncio.Semaphore(at_once or len(requests))

    async def generate(request: GenerateRequest) -> GenerateResult:
        async with room:
            return await service.generate(request)

    return await all_of([generate(each) for each in requests])


async def generate_apart(
    service: GenerationService,
    requests: Sequence[GenerateRequest],
    adapters: Sequence[str],
    at_once: int,
) -> list[list[GenerateResult] | LoraxError]:
    """Return the answers to requests through each adapter, or its first error.

    No adapter ends another one; of one that failed no other request is begun. ``at_once``: so
    many are in the house at a time.
    """
    # Where they are too many, some come while others are computed.
    is_few = len(requests) * len(adapters) <= at_once
    size = len(adapters) if is_few else max(1, min(len(adapters), at_once // 2))
    room = asyncio.Semaphore(max(1, at_once // size))
    # By adapter, then by request.
    answers: list[dict[int, GenerateResult]] = [{} for _ in adapters]
    errors: dict[int, LoraxError] = {}

    async def generate(number: int, part: Sequence[int]) -> None:
        async with room:
            places = [place for place in part if place not in errors]
            named = [adapters[place] for place in places]
            found = await service.generate_through(requests[number], named) if named else []
        for place, each in zip(places, found, strict=True):
            if isinstance(each, LoraxError):
                errors.setdefault(place, each)
            else:
                answers[place][number] = each

    parts = [range(len(adapters))[start : start + size] for start in range(0, len(adapters), size)]
    await all_of([generate(number, part) for number in range(len(requests)) for part in parts])
    return [
        errors.get(place) or [each[number] for number in range(len(requests))]
        for place, each in enumerate(answers)
    ]


class BatchStream:
    """The streams of several requests as one; sequences are counted through all of them.

    Sequence k of request i is number i * n + k, where each request has n sequences.
    """

    def __init__(self, streams: Sequence[AnswerStream], stack: AsyncExitStack) -> None:
        self.streams = streams
        self._stack = stack
        self._num_sequences = streams[0].request.num_sequences
        # Whose last chunk was not handed out: streams are read ahead.
        self._num_running = self._num_sequences * len(streams)
        self._chunks = Merge(streams)
        stack.push_async_callback(self._chunks.aclose)

    @classmethod
    async def open(cls, service: GenerationService, requests: Sequence[GenerateRequest]) -> Self:
        """Admit all requests; raises what one of them gets, and closes the others then."""
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(await service.generate_stream(each))
                for each in requests
            ]
            return cls(streams, stack.pop_all())

    @property
    def is_done(self) -> bool:
        """Whether each sequence has had its last chunk."""
        return not self._num_running

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(stream.request.num_prompt_tokens for stream in self.streams)

    @property
    def num_cached(self) -> int:
        """Tokens of all prompts that were in the cache."""
        return sum(stream.num_cached for stream in self.streams)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, of all sequences."""
        return sum(stream.num_generated for stream in self.streams)

    def hand_to(self, sink: Callable[[int, TokenChunk], None]) -> None:
        """Let the chunks of an only stream be handed over, as TokenStream says."""
        if len(self.streams) == 1:
            self.streams[0].hand_to(sink)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TokenChunk]:
        number, (sequence, chunk) = await anext(self._chunks)
        if chunk.finish is not FinishCode.RUNNING:
            self._num_running -= 1
        return number * self._num_sequences + sequence, chunk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
