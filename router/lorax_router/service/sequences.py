"""The chunks of all sequences of one request, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from lorax_contract.errors import (
    GenerationError,
    IncompleteGenerationError,
    NoNumbersError,
    ShardError,
)
from lorax_contract.step import FinishCode, OutputKind
from lorax_router.service.engine.port import ChunkSink, TokenChunk, TokenStream
from lorax_router.service.engine.row_cost import RowCost
from lorax_router.service.merge import Merge


class SequenceChunks:
    """Yields (sequence, chunk) until the last chunk of the last sequence; one reader.

    A sequence that fails ends all: its error is raised. The reader closes it (``aclosing``),
    which cancels what still runs. ``adapter`` is what they run with, for errors.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        output: OutputKind = OutputKind.TOKENS,
        *,
        adapter: str = "",
    ) -> None:
        self._adapter = adapter
        self._streams = streams
        self._output = output
        # The hot path: nothing between an only stream and its reader.
        self._chunks = Merge(streams) if len(streams) > 1 else None
        self._num_running = len(streams)

    @property
    def costs(self) -> list[RowCost]:
        """What each sequence takes; counted on while they run."""
        return [each.cost for each in self._streams]

    @property
    def is_done(self) -> bool:
        """Whether each sequence has had its last chunk."""
        return not self._num_running

    def hand_to(self, sink: ChunkSink) -> None:
        """Let the chunks of an only sequence be handed over, as TokenStream says.

        Those of several come by the reader: it could have some of them in its hands.
        """
        if len(self._streams) == 1:
            self._streams[0].hand_to(sink)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TokenChunk]:
        """IncompleteGenerationError: a sequence ended without a last chunk."""
        if not self._num_running:
            raise StopAsyncIteration
        try:
            if self._chunks is None:
                sequence, chunk = 0, await anext(self._streams[0])
            else:
                sequence, chunk = await anext(self._chunks)
        except StopAsyncIteration:
            raise IncompleteGenerationError from None
        if chunk.finish is not FinishCode.RUNNING:
            _check_last(chunk, self._output, self._adapter)
            self._num_running -= 1
        return sequence, chunk

    async def aclose(self) -> None:
        """Cancel what still runs."""
        self._num_running = 0
        if self._chunks is not None:
            await self._chunks.aclose()
        for stream in self._streams:
            await stream.aclose()


def _check_last(chunk: TokenChunk, output: OutputKind, adapter: str) -> None:
    """Raise the error of a last chunk that has one, or that lacks what a last chunk has."""
    if chunk.finish is FinishCode.ERROR:
        error = chunk.error
        if error is None:
            raise GenerationError("the engine gave no reason", public="")
        if isinstance(error, ShardError):
            raise GenerationError(str(error), public="a shard failed") from error
        if isinstance(error, NoNumbersError) and adapter:
            raise NoNumbersError(f"{error} (adapter {adapter})") from error
        raise error
    lacks_token = output is OutputKind.TOKENS and not chunk.tokens.ids
    lacks_vector = output.pools and chunk.vector is None
    if chunk.generated_text is None or lacks_token or lacks_vector:
        raise IncompleteGenerationError("the last chunk lacks what was asked for", public="")
