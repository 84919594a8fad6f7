"""The chunks of one streamed request, as a front end reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lorax_contract.errors import LoraxError
from lorax_contract.step import SamplingParams
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.open_request import OpenRequest
from lorax_router.service.results import AdapterUse, Timings


class GenerationStream:
    """The chunks of one streamed request as (sequence, chunk).

    The last chunk of each sequence has a ``finish`` that is not RUNNING; the stream ends after
    the last of them. Errors of the request are raised from ``__anext__``. The reader closes the
    stream (``async with`` does); closing it early cancels the request.
    """

    def __init__(self, opened: OpenRequest) -> None:
        assert opened.chunks is not None
        self.request = opened.valid
        # The seed to report: none was used when tokens are not drawn.
        self.seed = reported_seed(opened.valid.samplings[0])
        self._chunks = opened.chunks
        self._record = opened.record
        self._opened = opened

    def seed_of(self, sequence: int) -> int | None:
        """Return the seed of a sequence to report; None: none was used."""
        return reported_seed(self.request.samplings[sequence])

    @property
    def adapter_content(self) -> str:
        """What the adapter is that it uses; "": none. See Resumption."""
        return self._opened.adapter_content

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, of all sequences."""
        return self._record.num_generated

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that were in the cache; 0 before the first token."""
        return self._record.num_cached

    @property
    def num_skipped(self) -> int:
        """Output tokens that came in a step with an earlier one so far."""
        return self._record.num_skipped

    @property
    def timings(self) -> Timings:
        """What the first sequence took so far."""
        return self._record.timings

    @property
    def adapter(self) -> AdapterUse | None:
        """The adapter that it uses, and what that one's way here took."""
        return self._record.adapter

    @property
    def is_done(self) -> bool:
        """Whether each sequence has had its last chunk."""
        return self._chunks.is_done

    def hand_to(self, sink: Callable[[int, TokenChunk], None]) -> None:
        """Let chunks be handed to ``sink`` as they come, as TokenStream says; each is counted before."""
        progress = self._record.sequences[0]

        def take(chunk: TokenChunk) -> None:
            progress.take(chunk)
            sink(0, chunk)

        self._chunks.hand_to(take)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TokenChunk]:
        if not self._opened.is_open:
            raise StopAsyncIteration
        try:
            sequence, chunk = await anext(self._chunks)
        except StopAsyncIteration:
            self._opened.end(None)
            raise
        except LoraxError as error:
            self._opened.end(error)
            raise
        self._record.sequences[sequence].take(chunk)
        if self._chunks.is_done:
            # Permits end with the generation, whenever the client reads on.
            self._opened.end(None)
        return sequence, chunk

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        self._opened.end(asyncio.CancelledError())
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def reported_seed(sampling: SamplingParams) -> int | None:
    """The seed that made the output what it is; None when nothing was drawn."""
    return sampling.seed if sampling.do_sample else None
