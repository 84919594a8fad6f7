"""A front's side of the link: the service, the counts and the names of another process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorax_contract.adapters import AdapterRef
from lorax_contract.errors import LoraxError, ReplicaLostError, ValidationError
from lorax_contract.pooling import HeadFacts
from lorax_router.fronts.chunks import chunks_of
from lorax_router.fronts.faults import pack_fault, unpack_fault
from lorax_router.fronts.messages import (
    AskAnswer,
    AskCount,
    AskHead,
    AskManaged,
    AskMessage,
    AskRoom,
    AskStream,
    AskThrough,
    FromFront,
    NotePreloads,
    NoteRefused,
    NoteUnknownFields,
    TellAdapter,
    TellAnswer,
    TellChunks,
    TellCount,
    TellFault,
    TellHead,
    TellManaged,
    TellMessage,
    TellOpening,
    TellRoom,
    TellThrough,
    Withdraw,
    encode,
    of_key,
)
from lorax_router.fronts.remote_stream import RemoteStream
from lorax_router.fronts.values import pack_request, unpack_opening, unpack_result
from lorax_router.service.adapters.managed import ManagedChange, ManagedKnown, call_stamp
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.chat.parser_book import ParserBook
from lorax_router.service.generation import ignore_adapter
from lorax_router.service.origin import NOWHERE, Origin
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.results import AdapterUse, GenerateResult

Answer = (
    TellRoom | TellFault | TellAnswer | TellCount | TellHead | TellAdapter | TellOpening | TellChunks
    | TellMessage | TellManaged | TellThrough
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Opening:
    """One who waits for a stream, or reads it."""

    stream: RemoteStream
    request: GenerateRequest
    on_adapter: Callable[[AdapterUse], None]


class RemoteService:
    """Asks the core; a GenerationService.

    Args:
        send: takes messages to the core.
        parsers: those that answers may need.
    """

    def __init__(self, send: Callable[[bytes], None], parsers: ParserBook) -> None:
        self._send = send
        self._parsers = parsers
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._streams: dict[int, _Opening] = {}

    # --- a GenerationService ----------------------------------------------------------

    async def ask_room(self, caller: Caller) -> None:
        """Raise what a request of one sequence would get at once, whatever is in it."""
        number = next(self._numbers)
        await self._ask(number, AskRoom(number, caller), caller)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Return the whole answer; cancelling the call cancels the request."""
        number = next(self._numbers)
        message = AskAnswer(number, pack_request(request))
        answer: TellAnswer = await self._ask(number, message, request.caller, request.origin)
        return unpack_result(answer.result, request, self._parsers)

    async def generate_through(
        self, request: GenerateRequest, adapters: Sequence[str]
    ) -> list[GenerateResult | LoraxError]:
        """Return the whole answer through each adapter, or what is wrong with it, in their order.

        Not every version of a core answers this: it is for those of the front's own.
        """
        number = next(self._numbers)
        message = AskThrough(number, pack_request(request), [*adapters])
        told: TellThrough = await self._ask(number, message, request.caller, request.origin)
        return [
            unpack_fault(told.faults[place])
            if place in told.faults
            else unpack_result(told.results[place], request, self._parsers)
            for place in range(len(adapters))
        ]

    async def count_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens a prompt has for its model; nothing is generated."""
        number = next(self._numbers)
        message = AskCount(number, pack_request(request))
        answer: TellCount = await self._ask(number, message, request.caller, request.origin)
        return answer.count

    async def head_of(self, request: GenerateRequest) -> HeadFacts | None:
        """Return the head that would classify a request's text; None: there is none."""
        number = next(self._numbers)
        message = AskHead(number, pack_request(request))
        answer: TellHead = await self._ask(number, message, request.caller, request.origin)
        return answer.head

    async def answer(
        self, method: str, request: bytes, metadata: Sequence[tuple[str, str]]
    ) -> bytes:
        """Have the core answer a call over gRPC that does not generate; see MessageCalls."""
        number = next(self._numbers)
        message = AskMessage(number, method, request, [*metadata], call_stamp.get())
        told: TellMessage = await self._ask(number, message, ANYBODY)
        return told.answer

    def preload(self, refs: list[AdapterRef]) -> None:
        """Tell the core which adapters requests may come for."""
        self._send(encode(NotePreloads(refs)))

    async def managed(self, changes: Sequence[ManagedChange], since: float = 0.0) -> ManagedKnown:
        """Return what was managed by hand at the core, which takes over what was elsewhere.

        That is what was done since a Unix time.
        """
        number = next(self._numbers)
        message = AskManaged(number, [*changes], since)
        told: TellManaged = await self._ask(number, message, ANYBODY)
        return told.known

    async def generate_stream(
        self, request: GenerateRequest, on_adapter: Callable[[AdapterUse], None] = ignore_adapter
    ) -> RemoteStream:
        """Admit a request and return its chunks; the caller closes the stream.

        ``on_adapter`` hears of the adapter that it uses before it is waited for.
        """
        number = next(self._numbers)
        message = self._encoded(
            AskStream(number, pack_request(request)), request.caller, request.origin
        )
        stream = RemoteStream(lambda: self._withdraw(number))
        self._streams[number] = _Opening(stream, request, on_adapter)
        self._send(message)
        try:
            await stream.opening
        except asyncio.CancelledError:
            self._withdraw(number)
            raise
        return stream

    async def _ask(
        self, number: int, message: FromFront, caller: Caller, origin: Origin = NOWHERE
    ) -> Any:
        """Return the message that answers another; raises the error that does."""
        encoded = self._encoded(message, caller, origin)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        self._send(encoded)
        try:
            return await answer
        except asyncio.CancelledError:
            self._withdraw(number)
            raise
        finally:
            del self._asked[number]

    def _encoded(self, message: FromFront, caller: Caller, origin: Origin = NOWHERE) -> bytes:
        """Return the bytes of a message; ValidationError, counted, for what no parameter takes."""
        try:
            return encode(message)
        except OverflowError:
            error = ValidationError("a number in the request has more than 64 bits")
            self._send(encode(NoteRefused(pack_fault(error), caller, origin)))
            raise error from None

    def _withdraw(self, number: int) -> None:
        self._streams.pop(number, None)
        self._send(encode(Withdraw(number)))

    # --- what the core says -----------------------------------------------------------

    def take(self, message: Answer) -> None:
        """Take a message of the core's; one about what was withdrawn is of no use to anybody."""
        match message:
            case TellChunks():
                self._take_chunks(message)
            case TellFault(number, fault):
                self._fail(number, unpack_fault(fault))
            case TellOpening(number, opening):
                if (asked := self._streams.get(number)) is not None:
                    request = unpack_opening(opening, asked.request, self._parsers)
                    asked.stream.open(request, opening)
            case TellAdapter(number, adapter):
                if (asked := self._streams.get(number)) is not None:
                    asked.on_adapter(adapter)
            case (
                TellRoom(number)
                | TellAnswer(number)
                | TellThrough(number)
                | TellCount(number)
                | TellHead(number)
                | TellMessage(number)
                | TellManaged(number)
            ):
                waiting = self._asked.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)

    def lose(self) -> None:
        """The core is gone: nothing more comes for what was asked."""
        for number in [*self._asked, *self._streams]:
            self._fail(number, ReplicaLostError(public=""))

    def _take_chunks(self, message: TellChunks) -> None:
        streams = self._streams
        for key, chunk in chunks_of(message):
            number, sequence = of_key(key)
            if (asked := streams.get(number)) is not None:
                asked.stream.put(sequence, chunk)
        # The last chunk of a sequence is one of few that have more than tokens.
        ended: set[int] = set()
        for place, rest in message.rests.items():
            number, _ = of_key(message.keys[place])
            asked = streams.get(number)
            if asked is None:
                continue
            if rest.ending is not None:
                asked.stream.end(rest.ending)
            if asked.stream.has_ended:
                ended.add(number)
        for number in ended:
            del streams[number]

    def _fail(self, number: int, error: LoraxError) -> None:
        if (asked := self._streams.pop(number, None)) is not None:
            asked.stream.fail(error)
        waiting = self._asked.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)


class RemoteCounts:
    """Has the core count; a RequestCounts."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send

    def request_refused(
        self, error: BaseException, caller: Caller = ANYBODY, origin: Origin = NOWHERE
    ) -> None:
        """A request ended before the service had it."""
        fault = pack_fault(error) if isinstance(error, LoraxError) else None
        self._send(encode(NoteRefused(fault, caller, origin)))

    def unknown_fields(self, count: int) -> None:
        """A body had so many fields that nobody reads."""
        if count:
            self._send(encode(NoteUnknownFields(count)))
