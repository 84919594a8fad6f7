"""The chunks of one streamed request, as a front end reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lorax_contract.errors import LoraxError
from lorax_contract.step import SamplingParams
from lorax_router.service.adapters.directory import AdapterLease
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.permits import Permit
from lorax_router.service.records import RequestRecord
from lorax_router.service.requests import ValidRequest
from lorax_router.service.results import AdapterUse, Timings
from lorax_router.service.sequences import SequenceChunks


class GenerationStream:
    """The chunks of one streamed request as (sequence, chunk).

    The last chunk of each sequence has a ``finish`` that is not RUNNING; the stream ends after
    the last of them. Errors of the request are raised from ``__anext__``. The reader closes the
    stream (``async with`` does); closing it early cancels the request.
    """

    def __init__(
        self,
        request: ValidRequest,
        chunks: SequenceChunks,
        record: RequestRecord,
        permit: Permit,
        lease: AdapterLease | None,
    ) -> None:
        self.request = request
        # The seed to report: none was used when tokens are not drawn.
        self.seed = reported_seed(request.samplings[0])
        self._chunks = chunks
        self._record = record
        self._permit = permit
        self._lease = lease
        self._is_open = True

    def seed_of(self, sequence: int) -> int | None:
        """Return the seed of a sequence to report; None: none was used."""
        return reported_seed(self.request.samplings[sequence])

    @property
    def adapter_content(self) -> str:
        """What the adapter is that it uses; "": none. See Resumption."""
        return adapter_content(self._lease)

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
        if not self._is_open:
            raise StopAsyncIteration
        try:
            sequence, chunk = await anext(self._chunks)
        except StopAsyncIteration:
            self._end(None)
            raise
        except LoraxError as error:
            self._end(error)
            raise
        self._record.sequences[sequence].take(chunk)
        if self._chunks.is_done:
            # Permits end with the generation, whenever the client reads on.
            self._end(None)
        return sequence, chunk

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        if self._is_open:
            self._end(asyncio.CancelledError())
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

    def _end(self, error: BaseException | None) -> None:
        self._is_open = False
        if self._lease is not None:
            self._lease.release()
        self._permit.give_back()
        self._record.close(error)


def reported_seed(sampling: SamplingParams) -> int | None:
    """The seed that made the output what it is; None when nothing was drawn."""
    return sampling.seed if sampling.do_sample else None


def adapter_content(lease: AdapterLease | None) -> str:
    """What an adapter is, whatever server has it; "": there is none."""
    return "" if lease is None else lease.content.key
