"""An engine without scheduler or shard: answers each request from a script."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter

from lorax_contract.errors import LoraxError
from lorax_contract.step import (
    Alternatives,
    FinishCode,
    OutputKind,
    RequestId,
    RequestSpec,
    TokenColumns,
)
from lorax_router.core.request import ANY_TERMS, RequestTerms
from lorax_router.service.engine.port import ChunkSink, EngineStats, TokenChunk
from lorax_router.service.engine.row_cost import RowCost

Script = Callable[[RequestSpec], Iterator[TokenChunk]]


def words(
    *texts: str,
    finish: FinishCode = FinishCode.LENGTH,
    logprob: float = -0.5,
    num_alternatives: int = 0,
) -> Iterator[TokenChunk]:
    """One chunk per text, each a token; the last one ends with the whole text."""
    scheduled_at = perf_counter()
    for place, text in enumerate(texts):
        is_last = place == len(texts) - 1
        tokens = TokenColumns([100 + place], [logprob], [text], [False])
        ids = list(range(num_alternatives))
        yield TokenChunk(
            tokens,
            finish=finish if is_last else FinishCode.RUNNING,
            alternatives=[Alternatives(ids, [-0.1 * i for i in ids], [f"<{i}>" for i in ids])]
            if num_alternatives
            else [],
            generated_text="".join(texts) if is_last else None,
            received_at=perf_counter(),
            scheduled_at=scheduled_at,
        )


def failure(error: LoraxError) -> Iterator[TokenChunk]:
    """A request that fails without a token."""
    yield TokenChunk(TokenColumns(), FinishCode.ERROR, error=error)


def vector_of(spec: RequestSpec) -> bytes:
    """Four numbers of a prompt: its first id, its last, how many there are, its pooling."""
    ids = spec.prompt_ids
    return struct.pack("<4f", ids[0], ids[-1], len(ids), spec.pooling)


def as_many_as_asked(spec: RequestSpec) -> Iterator[TokenChunk]:
    """As many tokens as the request allows, at most 1000; what it asks for besides, too."""
    num = min(spec.stopping.max_new_tokens, 1000)
    sampling = spec.sampling
    chunks: Iterable[TokenChunk] = words(
        *(f" w{i}" for i in range(num)), num_alternatives=sampling.num_alternatives
    )
    if spec.output is not OutputKind.TOKENS:
        now = perf_counter()
        chunks = [
            TokenChunk(
                TokenColumns(), FinishCode.LENGTH, generated_text="", received_at=now,
                scheduled_at=now, vector=vector_of(spec) if spec.output is OutputKind.VECTOR else None,
            )
        ]  # fmt: skip
    for place, chunk in enumerate(chunks):
        if place == 0 and sampling.prompt_logprobs:
            size = len(spec.prompt_ids)
            logprobs = [float("nan"), *[-1.0] * (size - 1)]
            chunk.prompt_tokens = TokenColumns(
                list(spec.prompt_ids), logprobs, ["p"] * size, [False] * size
            )
        yield chunk


class _Stream:
    def __init__(self, engine: ScriptedEngine, spec: RequestSpec) -> None:
        self._engine = engine
        self._chunks = engine.script(spec)
        self._request_id = spec.request_id
        self._ended = False
        self.cost = RowCost()

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._ended:
            raise StopAsyncIteration
        await self._engine.open.wait()
        await asyncio.sleep(self._engine.delay_s)
        chunk = next(self._chunks, None)
        if chunk is None:
            raise StopAsyncIteration
        self._ended = chunk.finish is not FinishCode.RUNNING
        return chunk

    def hand_to(self, sink: ChunkSink) -> None:
        """All chunks are read."""

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._engine.cancelled.append(self._request_id)


class ScriptedEngine:
    """Implements EnginePort; ``open.clear()`` holds all streams, ``delay_s`` spaces their chunks."""

    def __init__(self, script: Script = as_many_as_asked, delay_s: float = 0.0) -> None:
        self.script = script
        self.delay_s = delay_s
        self.open = asyncio.Event()
        self.open.set()
        self.submitted: list[RequestSpec] = []
        self.terms: list[RequestTerms] = []
        self.cancelled: list[RequestId] = []
        self.unhealthy: LoraxError | None = None
        self.refusal: Exception | None = None
        # What the queue says to whoever comes.
        self.full: LoraxError | None = None
        self.hangs = False
        self._ids = itertools.count(1)

    def new_request_id(self) -> RequestId:
        return RequestId(next(self._ids))

    def check_place(
        self, terms: RequestTerms, *, num_requests: int = 1, num_tokens: int = 0
    ) -> None:
        """Raise what is planted; there is place for all else."""
        if self.full is not None:
            raise self.full

    def submit(self, spec: RequestSpec, terms: RequestTerms = ANY_TERMS) -> _Stream:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(spec)
        self.terms.append(terms)
        return _Stream(self, spec)

    def stats(self) -> EngineStats:
        return EngineStats(2, 3, 10, 4, 5, 6)

    async def health(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.unhealthy is not None:
            raise self.unhealthy
