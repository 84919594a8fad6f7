"""Generates by many replicas: chooses one for each request, and another one when that is lost."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from dataclasses import replace
from time import monotonic
from typing import Self, TypeVar

from lorax_contract.errors import DeadlineError, LoraxError
from lorax_contract.pooling import HeadFacts
from lorax_ingress.fleet import Chosen, Fleet
from lorax_ingress.resuming import LOST, OpenedStream, ResumingStream
from lorax_router.service.beside import all_of
from lorax_router.service.callers import Caller
from lorax_router.service.generation import ignore_adapter
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.results import AdapterUse, GenerateResult

# Replicas that a request may lose and go on: what ends one after the other may be its doing.
MOST_LOST = 3
# As a router draws one: it passes through every signed integer.
_SEED_BITS = 63

Answer = TypeVar("Answer")


class ReplicatedService:
    """A GenerationService over a fleet.

    A stream goes on elsewhere after its last token; a whole answer, of which nobody saw anything,
    begins anew from the same seed.

    Args:
        fleet: the replicas, and where requests go.
        clock: monotonic seconds.
    """

    def __init__(self, fleet: Fleet, clock: Callable[[], float] = monotonic) -> None:
        self._fleet = fleet
        self._clock = clock

    async def ask_room(self, caller: Caller) -> None:
        """Let everybody in: whether there is room, the replica says that the request goes to."""

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Return the whole answer; cancelling the call cancels the request."""
        return await self._whole(request, lambda chosen, asked: chosen.service.generate(asked))

    async def generate_through(
        self, request: GenerateRequest, adapters: Sequence[str]
    ) -> list[GenerateResult | LoraxError]:
        """Return the whole answer through each adapter, or what is wrong with it, in their order.

        Each goes to the replica that its adapter is for.
        """

        async def found(adapter: str) -> GenerateResult | LoraxError:
            try:
                return await self.generate(request.through(adapter))
            except LoraxError as error:
                return error

        return await all_of([found(each) for each in adapters])

    async def count_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens a prompt has for its model; nothing is generated."""
        return await self._whole(request, lambda chosen, asked: chosen.service.count_tokens(asked))

    async def head_of(self, request: GenerateRequest) -> HeadFacts | None:
        """Return the head that would classify a request's text; None: there is none."""
        return await self._whole(request, lambda chosen, asked: chosen.service.head_of(asked))

    async def generate_stream(
        self, request: GenerateRequest, on_adapter: Callable[[AdapterUse], None] = ignore_adapter
    ) -> ResumingStream:
        """Admit a request and return its chunks; the caller closes the stream.

        ``on_adapter`` hears of the adapter that it uses before it is waited for.
        """
        asked, journey = _with_seed(request), Journey(self._fleet, self._clock)

        async def first(chosen: Chosen, rest: GenerateRequest) -> OpenedStream:
            return OpenedStream(await chosen.service.generate_stream(rest, on_adapter), chosen)

        return ResumingStream(asked, await journey.over(asked, first), journey)

    async def _whole(
        self,
        request: GenerateRequest,
        work: Callable[[Chosen, GenerateRequest], Awaitable[Answer]],
    ) -> Answer:
        async def done(chosen: Chosen, rest: GenerateRequest) -> Answer:
            answer = await work(chosen, rest)
            chosen.begins()
            chosen.ends()
            return answer

        return await Journey(self._fleet, self._clock).over(_with_seed(request), done)


class Journey:
    """The way of one request from replica to replica, until one does what is asked."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._clock = clock
        self._begun_at = clock()
        self._num_lost = 0

    async def over(
        self,
        request: GenerateRequest,
        work: Callable[[Chosen, GenerateRequest], Awaitable[Answer]],
    ) -> Answer:
        """Do something at a replica, and at another one when that is lost meanwhile.

        What is chosen ends with an error; else ``work`` has it end. Raises what a replica says of
        the request, and the loss itself once there were too many.
        """
        while True:
            chosen = await self._fleet.choose(request)
            try:
                return await work(chosen, self._in_time(request))
            except LOST as error:
                chosen.fails(error)
                self._note_lost(error)
            except BaseException:
                chosen.ends()
                raise

    async def go_on(self, request: GenerateRequest, error: LoraxError) -> OpenedStream:
        """Open the rest of a stream elsewhere, once the replica that wrote it is lost."""
        self._note_lost(error)
        return await self.over(request, _open)

    def fork(self) -> Self:
        """Return the way of one sequence that goes on apart, with what is lost so far behind it.

        Each loses replicas by itself: what all of them lose at once is one for each.
        """
        return copy(self)

    def _note_lost(self, error: LoraxError) -> None:
        """One replica more is lost to the request; raises that once there were too many."""
        self._num_lost += 1
        if self._num_lost > MOST_LOST:
            raise error
        self._fleet.resumed()

    def _in_time(self, request: GenerateRequest) -> GenerateRequest:
        """Return a request whose time is what is left of it."""
        timeout_s = request.parameters.timeout_s
        if timeout_s is None:
            return request
        left = timeout_s - (self._clock() - self._begun_at)
        if left <= 0.0:
            raise DeadlineError("the time that the client gave it is over")
        return replace(request, parameters=replace(request.parameters, timeout_s=left))


async def _open(chosen: Chosen, request: GenerateRequest) -> OpenedStream:
    return OpenedStream(await chosen.service.generate_stream(request), chosen)


def _with_seed(request: GenerateRequest) -> GenerateRequest:
    """Return a request that draws the same wherever it is computed."""
    parameters = request.parameters
    several = parameters.n is None and (parameters.best_of or 1) > 1
    if parameters.seed is not None or several:
        return request
    return replace(request, parameters=replace(parameters, seed=secrets.randbits(_SEED_BITS)))
