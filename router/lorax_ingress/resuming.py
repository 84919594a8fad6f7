"""A streamed answer that goes on at another replica when the one that writes it is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import Protocol, Self

from lorax_contract.errors import (
    LoraxError,
    ReplicaLostError,
    ShuttingDownError,
    UnhealthyError,
)
from lorax_contract.step import FinishCode
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.generation import AnswerStream, AskedRequest
from lorax_router.service.merge import Merge
from lorax_router.service.requests import GenerateRequest, Resumption
from lorax_router.service.results import AdapterUse, Timings

# What a replica says, or is silent with, that another one would not.
LOST = (ReplicaLostError, ShuttingDownError, UnhealthyError)

Sink = Callable[[int, TokenChunk], None]


class Ticket(Protocol):
    """Tells whoever chose the replica how far a stream is."""

    def begins(self) -> None:
        """Its first token is there."""

    def ends(self) -> None:
        """It is over; more than once does nothing."""


@dataclass(frozen=True, slots=True)
class OpenedStream:
    """A stream at one replica."""

    stream: AnswerStream
    ticket: Ticket


class Way(Protocol):
    """The way of one stream from replica to replica."""

    async def go_on(self, request: GenerateRequest, error: LoraxError) -> OpenedStream:
        """Open it at the next replica, told why the last one did not do; raises if none does."""

    def fork(self) -> Self:
        """Return the way of one sequence that goes on apart: what is behind it, all share."""


class ResumingStream:
    """The chunks of one streamed request, whichever replicas they come from; an AnswerStream.

    ::

        replica A   t0 t1 t2 ✝
        replica B            t3 t4 t5 end      its request: the same, and [t0 t1 t2]

    What was read or handed over is what the next replica is told; what it lost on its way is
    computed again, from the same seed, by the same adapter. Several sequences go on as one
    stream each.

    Args:
        request: what was asked, with a seed where tokens are drawn.
        opened: its stream at the first replica.
        way: has it go on at another one.
    """

    def __init__(self, request: GenerateRequest, opened: OpenedStream, way: Way) -> None:
        self._asked = request
        self._stream, self._ticket = opened.stream, opened.ticket
        self._way = way
        # Of the first stream: what the client was told stays true.
        self.request: AskedRequest = self._stream.request
        self.seed = self._stream.seed
        self.adapter_content = self._stream.adapter_content
        num = self.request.num_sequences
        self._seeds = [self._stream.seed_of(each) for each in range(num)]
        # When it began here, and the seconds until its first token and its latest replica.
        self._begun_at = perf_counter()
        self._first_s = self._lost_s = 0.0
        self._ids: list[list[int]] = [[] for _ in range(num)]
        self._running = set(range(num))
        # Once several sequences go on apart: what is left of them, by their numbers.
        self._apart: dict[int, ResumingStream] = {}
        self._merge: Merge[tuple[int, TokenChunk]] | None = None
        self._numbers: list[int] = []
        self._sink: Sink | None = None
        self._has_begun = False
        # Counted by the streams before this one.
        self._generated = self._skipped = self._cached = 0

    # --- what is known of it ----------------------------------------------------------

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, of all sequences."""
        apart = sum(each.num_generated for each in self._apart.values())
        return self._generated + self._stream.num_generated + apart

    @property
    def num_skipped(self) -> int:
        """Output tokens that came in a step with an earlier one so far."""
        apart = sum(each.num_skipped for each in self._apart.values())
        return self._skipped + self._stream.num_skipped + apart

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that were in the cache, where the answer began."""
        return self._cached or self._stream.num_cached

    def seed_of(self, sequence: int) -> int | None:
        """Return the seed of a sequence to report; None: none was used."""
        return self._seeds[sequence]

    @property
    def timings(self) -> Timings:
        """What it took, as the latest replica says; what was before that counts with the whole."""
        said = self._latest.timings
        if not self._lost_s:
            return said
        received_at = said.received_at - self._lost_s
        first_at = received_at + self._first_s if self._first_s else said.first_token_at
        # What is between is the validation and the queue of the latest one, and what was lost.
        return replace(said, received_at=received_at, first_token_at=first_at)

    @property
    def adapter(self) -> AdapterUse | None:
        """The adapter that it uses, as the latest replica says."""
        return self._latest.adapter

    @property
    def _latest(self) -> AnswerStream:
        return self._apart[min(self._apart)] if self._apart else self._stream

    @property
    def is_done(self) -> bool:
        """Whether each sequence has had its last chunk."""
        return not self._running

    # --- the reader's side ------------------------------------------------------------

    def hand_to(self, sink: Sink) -> None:
        """Let chunks be handed to ``sink`` as they come; those of sequences apart are read."""
        self._sink = sink
        if not self._apart:
            self._stream.hand_to(self._hand_over)

    def _hand_over(self, sequence: int, chunk: TokenChunk) -> None:
        assert self._sink is not None
        self._ids[sequence] += chunk.tokens.ids
        self._sink(sequence, chunk)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TokenChunk]:
        if not self._running:
            raise StopAsyncIteration
        while True:
            try:
                sequence, chunk = await self._next()
                break
            except LOST as error:
                await self._go_on(error)
        if not self._has_begun:
            self._has_begun = True
            self._first_s = self._first_s or perf_counter() - self._begun_at
            self._ticket.begins()
        self._ids[sequence] += chunk.tokens.ids
        if chunk.finish is not FinishCode.RUNNING:
            self._running.discard(sequence)
            if not self._running:
                self._ticket.ends()
        return sequence, chunk

    async def _next(self) -> tuple[int, TokenChunk]:
        if self._merge is None:
            return await anext(self._stream)
        place, (_, chunk) = await anext(self._merge)
        return self._numbers[place], chunk

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        if self._merge is not None:
            await self._merge.aclose()
        for each in (self._stream, *self._apart.values()):
            await each.aclose()
        self._ticket.ends()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    # --- a replica is lost --------------------------------------------------------------

    async def _go_on(self, error: LoraxError) -> None:
        """Have all that is not done go on elsewhere; raises what the others say."""
        if self._merge is not None:
            # Each of the sequences apart has tried by itself.
            raise error
        await self._stream.aclose()
        self._ticket.ends()
        self._lost_s = perf_counter() - self._begun_at
        if len(self._ids) > 1:
            await self._part(error)
            return
        opened = await self._way.go_on(self._rest_of(0), error)
        self._count_lost()
        self._stream, self._ticket = opened.stream, opened.ticket
        self._has_begun = False
        if self._sink is not None:
            self._stream.hand_to(self._hand_over)

    def _count_lost(self) -> None:
        """Keep the counts of a stream that another one takes the place of."""
        self._cached = self.num_cached
        self._generated += self._stream.num_generated
        self._skipped += self._stream.num_skipped

    async def _part(self, error: LoraxError) -> None:
        """Have each sequence go on as a request of its own."""
        for sequence in sorted(self._running):
            rest, way = self._rest_of(sequence), self._way.fork()
            self._apart[sequence] = ResumingStream(rest, await way.go_on(rest, error), way)
        self._numbers = [*self._apart]
        self._merge = Merge([*self._apart.values()])

    def _rest_of(self, sequence: int) -> GenerateRequest:
        """Return the request for the rest of a sequence."""
        asked, before = self._asked, self._asked.resumption
        parameters = replace(asked.parameters, n=None, best_of=None)
        if parameters.seed is not None:
            parameters = replace(parameters, seed=(parameters.seed + sequence) % (1 << 64))
        earlier = [] if before is None else before.output_ids
        resumption = Resumption(
            output_ids=[*earlier, *self._ids[sequence]], adapter_content=self.adapter_content
        )
        return replace(asked, parameters=parameters, resumption=resumption)
