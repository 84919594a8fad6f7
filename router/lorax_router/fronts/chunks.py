"""The chunks of a step as columns: gathered in the core for one front, and taken apart there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from lorax_contract.step import FinishCode, TokenColumns
from lorax_router.fronts.messages import ChunkRest, StreamEnding, TellChunks
from lorax_router.service.engine.port import TokenChunk


class ChunkColumns:
    """Gathers chunks until the end of the engine's delivery of a step, then sends them at once.

    Args:
        send: takes the message.
    """

    def __init__(self, send: Callable[[TellChunks], None]) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._clear()

    def add(
        self,
        key: int,
        chunk: TokenChunk,
        *,
        is_first: bool = False,
        ending: StreamEnding | None = None,
    ) -> None:
        """Take a chunk of a sequence. Called for each token of each stream: keep it cheap."""
        if not self._keys:
            # The engine hands over the chunks of a step without a pause.
            self._loop.call_soon(self.flush)
        tokens = chunk.tokens
        if is_first or chunk.alternatives or chunk.finish is not FinishCode.RUNNING:
            self._rests[len(self._keys)] = _rest(chunk, ending)
        self._keys.append(key)
        self._counts.append(len(tokens.ids))
        self._ids += tokens.ids
        self._logprobs += tokens.logprobs
        self._texts += tokens.texts
        self._special += tokens.special

    def flush(self) -> None:
        """Send what was gathered; whatever else is sent of a stream comes behind it."""
        if not self._keys:
            return
        counts = self._counts
        if counts.count(1) == len(counts):
            counts = []
        message = TellChunks(
            self._keys, counts, self._ids, self._logprobs, self._texts, self._special, self._rests
        )
        self._clear()
        self._send(message)

    def _clear(self) -> None:
        self._keys: list[int] = []
        self._counts: list[int] = []
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._texts: list[str] = []
        self._special: list[bool] = []
        self._rests: dict[int, ChunkRest] = {}


def chunks_of(message: TellChunks) -> Iterator[tuple[int, TokenChunk]]:
    """Yield each chunk with the key of its sequence."""
    all_tokens = TokenColumns(message.ids, message.logprobs, message.texts, message.special)
    counts = message.counts or [1] * len(message.keys)
    rests, start = message.rests, 0
    for place, (key, count) in enumerate(zip(message.keys, counts)):
        chunk = TokenChunk(all_tokens.part(start, start + count))
        if place in rests:
            _complete(chunk, rests[place])
        start += count
        yield key, chunk


def _rest(chunk: TokenChunk, ending: StreamEnding | None) -> ChunkRest:
    return ChunkRest(
        chunk.finish,
        chunk.alternatives,
        chunk.generated_text,
        chunk.prompt_tokens,
        chunk.prompt_alternatives,
        chunk.num_cached_tokens,
        ending,
        chunk.vector,
    )


def _complete(chunk: TokenChunk, rest: ChunkRest) -> None:
    chunk.finish = FinishCode(rest.finish)
    chunk.alternatives = rest.alternatives
    chunk.generated_text = rest.generated_text
    chunk.prompt_tokens = rest.prompt_tokens
    chunk.prompt_alternatives = rest.prompt_alternatives
    chunk.num_cached_tokens = rest.num_cached_tokens
    chunk.vector = rest.vector
