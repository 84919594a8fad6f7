"""The chunks of one request on their way from the engine loop to whoever reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Self

from lorax_contract.step import FinishCode, RequestSpec
from lorax_router.service.engine.port import ChunkSink, TokenChunk
from lorax_router.service.engine.row_cost import RowCost


class EngineStream:
    """The chunks of one request on their way to its client; implements TokenStream."""

    __slots__ = (
        "_cancel", "_chunks", "_ended", "_fault", "_sink", "_wake", "cost", "first_sent", "handle",
        "spec", "submitted_at",
    )  # fmt: skip

    def __init__(self, cancel: Callable[[], None], spec: RequestSpec, submitted_at: float) -> None:
        self.spec = spec
        self.handle = spec.adapter
        self.submitted_at = submitted_at
        self._chunks: deque[TokenChunk] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._sink: ChunkSink | None = None
        # What it raised: the reader's to deal with.
        self._fault: Exception | None = None
        self._cancel = cancel
        self._ended = False
        self.cost = RowCost()
        self.first_sent = False

    def put(self, chunk: TokenChunk) -> None:
        """Hand over a chunk; never waits."""
        sink = self._sink
        if sink is not None and not self._chunks and chunk.finish is FinishCode.RUNNING:
            try:
                sink(chunk)
            except Exception as error:  # noqa: BLE001 - the reader raises it
                self._sink, self._fault = None, error
            else:
                return
        self._chunks.append(chunk)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def hand_to(self, sink: ChunkSink) -> None:
        """Let chunks that are not the last one be handed over as they come."""
        self._sink = sink

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._ended:
            raise StopAsyncIteration
        while not self._chunks:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        if self._fault is not None:
            raise self._fault
        chunk = self._chunks.popleft()
        self._ended = chunk.finish != FinishCode.RUNNING
        return chunk

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        self._sink = None
        if not self._ended:
            self._ended = True
            self._cancel()
