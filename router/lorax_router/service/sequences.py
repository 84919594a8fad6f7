"""The chunks of all sequences of one request, as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Self

from lorax_contract.errors import GenerationError, IncompleteGenerationError, ShardError
from lorax_contract.step import FinishCode, OutputKind
from lorax_router.service.engine.port import TokenChunk, TokenStream


class SequenceChunks:
    """Yields (sequence, chunk) until the last chunk of the last sequence; one reader.

    A sequence that fails ends all: its error is raised. The reader closes it (``aclosing``),
    which cancels what still runs.
    """

    def __init__(
        self, streams: Sequence[TokenStream], output: OutputKind = OutputKind.TOKENS
    ) -> None:
        self._streams = streams
        self._output = output
        self._num_running = len(streams)
        # Of several sequences: what is waited for, by the sequence that it comes from.
        self._awaited: dict[asyncio.Future[TokenChunk], int] = {}
        self._ready: deque[tuple[int, TokenChunk]] = deque()

    @property
    def is_done(self) -> bool:
        """Whether each sequence has had its last chunk."""
        return not self._num_running

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TokenChunk]:
        """Raises what ended the request, IncompleteGenerationError for an end without a last token."""
        if not self._num_running:
            raise StopAsyncIteration
        try:
            sequence, chunk = await self._next()
        except StopAsyncIteration:
            raise IncompleteGenerationError from None
        if chunk.finish is not FinishCode.RUNNING:
            _check_last(chunk, self._output)
            self._num_running -= 1
        return sequence, chunk

    async def aclose(self) -> None:
        """Cancel what still runs."""
        self._num_running = 0
        for future in self._awaited:
            if not future.cancel() and not future.cancelled():
                # It failed as well; one error was raised already.
                future.exception()
        for stream in self._streams:
            await stream.aclose()

    async def _next(self) -> tuple[int, TokenChunk]:
        if len(self._streams) == 1:
            # The hot path: nothing between the engine's stream and its reader.
            return 0, await anext(self._streams[0])
        if not self._ready:
            await self._wait()
        return self._ready.popleft()

    async def _wait(self) -> None:
        """Wait until a sequence has a chunk; those of one step come in the order of sequences."""
        if not self._awaited:
            for sequence in range(len(self._streams)):
                self._expect(sequence)
        done, _ = await asyncio.wait(self._awaited, return_when=asyncio.FIRST_COMPLETED)
        for future in sorted(done, key=self._awaited.__getitem__):
            sequence, chunk = self._awaited.pop(future), future.result()
            self._ready.append((sequence, chunk))
            if chunk.finish is FinishCode.RUNNING:
                self._expect(sequence)

    def _expect(self, sequence: int) -> None:
        self._awaited[asyncio.ensure_future(_chunk_of(self._streams[sequence]))] = sequence


async def _chunk_of(stream: TokenStream) -> TokenChunk:
    """A future cannot carry StopAsyncIteration."""
    try:
        return await anext(stream)
    except StopAsyncIteration:
        raise IncompleteGenerationError from None


def _check_last(chunk: TokenChunk, output: OutputKind) -> None:
    """Raise the error of a last chunk that has one, or that lacks what a last chunk has."""
    if chunk.finish is FinishCode.ERROR:
        error = chunk.error
        if error is None:
            raise GenerationError("the engine gave no reason", public="")
        if isinstance(error, ShardError):
            raise GenerationError(str(error), public="a shard failed") from error
        raise error
    lacks_token = output is OutputKind.TOKENS and not chunk.tokens.ids
    if chunk.generated_text is None or lacks_token:
        raise IncompleteGenerationError("the last chunk has no text or no token", public="")
