"""A stream whose chunks another process sends; an AnswerStream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lorax_contract.errors import LoraxError
from lorax_contract.step import FinishCode
from lorax_router.fronts.messages import StreamEnding
from lorax_router.fronts.values import OpenedRequest, PackedOpening
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.results import AdapterUse, Timings

Sink = Callable[[int, TokenChunk], None]


class RemoteStream:
    """The chunks of one streamed request, as they arrive; see GenerationStream.

    Args:
        leave: tells the core that nobody reads any more.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        # Resolved once the request is admitted.
        self.opening: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.request: OpenedRequest
        self.seed: int | None = None
        self.adapter_content = ""
        # Known at the end.
        self.timings = Timings(received_at=0.0)
        self.adapter: AdapterUse | None = None
        self.num_generated = 0
        self.num_skipped = 0
        # Of each sequence.
        self._seeds: list[int | None] = []
        self._cached: list[int] = []
        # Sequences whose last chunk was not read, and whose did not arrive.
        self._num_running = self._num_coming = 0
        self._chunks: deque[tuple[int, TokenChunk]] = deque()
        self._sink: Sink | None = None
        # What the core said instead of a chunk, and what the sink raised.
        self._error: LoraxError | None = None
        self._fault: Exception | None = None
        self._wake: asyncio.Future[None] | None = None
        self._is_open = True

    # --- what arrives -------------------------------------------------------------

    def open(self, request: OpenedRequest, opening: PackedOpening) -> None:
        """The request is admitted; chunks follow."""
        self.request, self.seed = request, opening.seed
        self.adapter_content, self._seeds = opening.adapter_content, opening.seeds
        self._num_running = self._num_coming = request.num_sequences
        self._cached = [0] * request.num_sequences
        if not self.opening.done():
            self.opening.set_result(None)

    def fail(self, error: LoraxError) -> None:
        """The request has failed, before it was admitted or after."""
        self._error = error
        if not self.opening.done():
            self.opening.set_exception(error)
        self._wake_reader()

    def put(self, sequence: int, chunk: TokenChunk) -> None:
        """Hand over a chunk; never waits."""
        sink = self._sink
        if sink is not None and not self._chunks and chunk.finish is FinishCode.RUNNING:
            self._count(sequence, chunk)
            try:
                sink(sequence, chunk)
            except Exception as error:  # noqa: BLE001 - the reader raises it
                self._sink, self._fault = None, error
                self._wake_reader()
            return
        if chunk.finish is not FinishCode.RUNNING:
            self._num_coming -= 1
        self._chunks.append((sequence, chunk))
        self._wake_reader()

    def end(self, ending: StreamEnding) -> None:
        """All has arrived."""
        self.timings, self.adapter = ending.timings, ending.adapter

    @property
    def has_ended(self) -> bool:
        """Whether nothing more arrives."""
        return not self._num_coming

    def _wake_reader(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _count(self, sequence: int, chunk: TokenChunk) -> None:
        num = len(chunk.tokens.ids)
        self.num_generated += num
        if num > 1:
            self.num_skipped += num - 1
        if chunk.num_cached_tokens:
            self._cached[sequence] = chunk.num_cached_tokens

    # --- the reader's side ----------------------------------------------------------

    def seed_of(self, sequence: int) -> int | None:
        """Return the seed of a sequence to report; None: none was used."""
        return self._seeds[sequence] if self._seeds else self.seed

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that were in the cache, for whichever sequence found least."""
        return min(self._cached)

    @property
    def is_done(self) -> bool:
        """Whether each sequence has had its last chunk."""
        return not self._num_running

    def hand_to(self, sink: Sink) -> None:
        """Let chunks be handed to ``sink`` as they come, as TokenStream says; each is counted before."""
        self._sink = sink

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TokenChunk]:
        if not self._is_open:
            raise StopAsyncIteration
        while not self._chunks and self._fault is None and self._error is None:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        if self._fault is not None:
            raise self._fault
        if not self._chunks:
            assert self._error is not None
            self._is_open = False
            raise self._error
        sequence, chunk = self._chunks.popleft()
        self._count(sequence, chunk)
        if chunk.finish is not FinishCode.RUNNING:
            self._num_running -= 1
            self._is_open = not self.is_done
        return sequence, chunk

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        self._sink = None
        if self._is_open:
            self._is_open = False
            self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
