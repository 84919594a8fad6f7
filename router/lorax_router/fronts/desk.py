"""The core's side of the link to one front: does what the front asks for, and tells it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from starlette.types import ASGIApp

from lorax_contract.errors import LoraxError
from lorax_router.fronts.chunks import ChunkColumns
from lorax_router.fronts.core_call import CoreCall
from lorax_router.fronts.faults import pack_fault, unpack_fault
from lorax_router.fronts.messages import (
    AskAnswer,
    AskCall,
    AskCount,
    AskHead,
    AskManaged,
    AskMessage,
    AskRoom,
    AskStream,
    AskThrough,
    CallPart,
    FromCore,
    FromFront,
    NoteEnded,
    NotePreloads,
    NoteReady,
    NoteRefused,
    NoteUnknownFields,
    StreamEnding,
    TellAdapter,
    TellAliases,
    TellAnswer,
    TellCount,
    TellFault,
    TellHead,
    TellManaged,
    TellMessage,
    TellOpening,
    TellRoom,
    TellThrough,
    Withdraw,
    decode_up,
    encode,
    key_of,
)
from lorax_router.fronts.values import pack_opening, pack_result, unpack_request
from lorax_router.service.adapters.aliases import AliasBook
from lorax_router.service.adapters.managed import call_stamp
from lorax_router.service.adapters.preloading import Preloader
from lorax_router.service.adapters.taking_over import ManagedKeeper
from lorax_router.service.callers import Caller
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.generation import GenerationService, RequestCounts

logger = logging.getLogger(__name__)


class MessageCalls(Protocol):
    """Answers calls over gRPC that do not generate."""

    async def answer(
        self, method: str, request: bytes, metadata: Sequence[tuple[str, str]]
    ) -> bytes:
        """Return the bytes of the answer; raises what is wrong with the call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreParts:
    """What a core has for its fronts."""

    service: GenerationService
    counts: RequestCounts
    # Answers all calls that do not generate.
    app: ASGIApp
    aliases: AliasBook
    # None: fronts have none.
    messages: MessageCalls | None = None
    # None: nothing is managed by hand.
    managed: ManagedKeeper | None = None
    # None: nothing is loaded before a request comes.
    preloads: Preloader | None = None


class FrontDesk:
    """Serves one front for as long as it lives.

    Args:
        parts: what does the work.
        send: takes messages to the front.
        on_ready: called when the front takes connections.
        on_ended: called with how many of its connections have ended.
    """

    def __init__(
        self,
        parts: CoreParts,
        send: Callable[[bytes], None],
        on_ready: Callable[[], None],
        on_ended: Callable[[int], None],
    ) -> None:
        self._parts = parts
        self._send_bytes = send
        self._on_ready = on_ready
        self._on_ended = on_ended
        self._columns = ChunkColumns(self._send)
        self._work: dict[int, asyncio.Task[None]] = {}
        self._calls: dict[int, CoreCall] = {}

    def open(self) -> None:
        """Tell the front what it has to know before anything else, and of changes from now on."""
        names = [each.name for each in self._parts.aliases]
        self._send(TellAliases(names, [], [*map(self._target, names)]))
        self._parts.aliases.watchers.add(self._tell_alias)

    async def close(self) -> None:
        """Cancel all that the front has asked for; returns when it is over."""
        self._parts.aliases.watchers.discard(self._tell_alias)
        work = [*self._work.values()]
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    def take(self, data: memoryview) -> None:
        """Take the bytes of a message of the front's."""
        self.do(decode_up(data))

    def do(self, message: FromFront) -> None:
        """Do what a message says."""
        match message:
            case AskRoom(number, caller):
                self._begin(number, partial(self._room, number, caller))
            case AskAnswer(number):
                self._begin(number, partial(self._answer, message))
            case AskThrough(number):
                self._begin(number, partial(self._through, message))
            case AskStream(number):
                self._begin(number, partial(self._stream, message))
            case AskCount(number):
                self._begin(number, partial(self._count, message))
            case AskHead(number):
                self._begin(number, partial(self._head, message))
            case AskMessage(number):
                self._begin(number, partial(self._message, message))
            case AskManaged(number):
                self._begin(number, partial(self._managed, message))
            case AskCall(number):
                call = self._calls[number] = CoreCall(message, self._send)
                self._begin(number, partial(self._call, message, call))
            case CallPart(number):
                if (call_ := self._calls.get(number)) is not None:
                    call_.put(message)
            case _:
                self._note(message)

    def _note(self, message: object) -> None:
        match message:
            case Withdraw(number):
                if (task := self._work.get(number)) is not None:
                    task.cancel()
            case NoteRefused(fault, caller, origin):
                error = asyncio.CancelledError() if fault is None else unpack_fault(fault)
                self._parts.counts.request_refused(error, caller, origin)
            case NoteUnknownFields(count):
                self._parts.counts.unknown_fields(count)
            case NotePreloads(refs) if self._parts.preloads is not None:
                self._parts.preloads.take(refs)
            case NoteEnded(count):
                self._on_ended(count)
            case NoteReady():
                self._on_ready()

    def _begin(self, number: int, work: Callable[[], Awaitable[None]]) -> None:
        task = self._work[number] = asyncio.get_running_loop().create_task(
            self._in_words(number, work)
        )
        task.add_done_callback(lambda _: self._forget(number))

    def _forget(self, number: int) -> None:
        self._work.pop(number, None)
        self._calls.pop(number, None)

    async def _in_words(self, number: int, work: Callable[[], Awaitable[None]]) -> None:
        """Do what a front asked for; what goes wrong is told it."""
        try:
            await work()
        except LoraxError as error:
            self._fail(number, error)
        except Exception:
            logger.exception("unexpected error in a front's request")
            self._fail(number, LoraxError(public=""))

    def _fail(self, number: int, error: LoraxError) -> None:
        # What came before it is on its way before it.
        self._columns.flush()
        self._send(TellFault(number, pack_fault(error)))

    async def _room(self, number: int, caller: Caller) -> None:
        await self._parts.service.ask_room(caller)
        self._send(TellRoom(number))

    async def _answer(self, asked: AskAnswer) -> None:
        result = await self._parts.service.generate(unpack_request(asked.request))
        self._send(TellAnswer(asked.number, pack_result(result)))

    async def _through(self, asked: AskThrough) -> None:
        request = unpack_request(asked.request)
        found = await self._parts.service.generate_through(request, asked.adapters)
        results, faults = {}, {}
        for place, each in enumerate(found):
            if isinstance(each, LoraxError):
                faults[place] = pack_fault(each)
            else:
                results[place] = pack_result(each)
        self._send(TellThrough(asked.number, results, faults))

    async def _count(self, asked: AskCount) -> None:
        count = await self._parts.service.count_tokens(unpack_request(asked.request))
        self._send(TellCount(asked.number, count))

    async def _head(self, asked: AskHead) -> None:
        head = await self._parts.service.head_of(unpack_request(asked.request))
        self._send(TellHead(asked.number, head))

    async def _call(self, asked: AskCall, call: CoreCall) -> None:
        call_stamp.set(asked.stamp)
        await call.run(self._parts.app)

    async def _message(self, asked: AskMessage) -> None:
        assert self._parts.messages is not None
        call_stamp.set(asked.stamp)
        answer = await self._parts.messages.answer(asked.method, asked.request, asked.metadata)
        self._send(TellMessage(asked.number, answer))

    async def _managed(self, asked: AskManaged) -> None:
        keeper = self._parts.managed
        assert keeper is not None
        if asked.changes:
            keeper.hear(asked.changes)
            await keeper.save()
        self._send(TellManaged(asked.number, keeper.known(asked.since)))

    async def _stream(self, asked: AskStream) -> None:
        number, columns = asked.number, self._columns
        opened = await self._parts.service.generate_stream(
            unpack_request(asked.request),
            lambda adapter: self._send(TellAdapter(number, adapter)),
        )

        def hand_over(sequence: int, chunk: TokenChunk) -> None:
            columns.add(key_of(number, sequence), chunk)

        begun: set[int] = set()
        async with opened as stream:
            self._send(TellOpening(number, pack_opening(stream)))
            async for sequence, chunk in stream:
                is_first = sequence not in begun
                begun.add(sequence)
                key, is_done = key_of(number, sequence), stream.is_done
                ending = StreamEnding(stream.timings, stream.adapter) if is_done else None
                columns.add(key, chunk, is_first=is_first, ending=ending)
                if is_done:
                    break
                stream.hand_to(hand_over)

    def _tell_alias(self, name: str, is_known: bool) -> None:
        known = TellAliases([name], [], [self._target(name)])
        self._send(known if is_known else TellAliases([], [name]))

    def _target(self, name: str) -> str:
        return self._parts.aliases.stands_for(name) or name

    def _send(self, message: FromCore) -> None:
        self._send_bytes(encode(message))
