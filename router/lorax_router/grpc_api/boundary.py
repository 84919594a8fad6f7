"""What all methods of the public service have around them: bounds, deadlines, errors.

A method gets its request and a ``PublicCall``. Before that the request must have come in time and there
must be place for it; an error of ours becomes a rich status, any other one an answer that tells
nothing inside. A call that is cancelled, or whose deadline passes, cancels the method.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from lorax_contract.errors import (
    BadRequestError,
    DeadlineError,
    LoraxError,
    OverloadedError,
    SlowRequestError,
)
from lorax_router.grpc_api.auth import KEY_NAMES, bearer_of, caller_of
from lorax_router.grpc_api.errors import (
    FIELDS,
    REQUEST_ID,
    SlowReaderError,
    pushback,
    rich_status,
)
from lorax_router.grpc_api.limits import CallLimits
from lorax_router.grpc_api.reply import ClientLeftError, ReplyQueue, UnreadBytes
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.keys.store import KeyStore
from lorax_router.service.origin import Origin

logger = logging.getLogger(__name__)

_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")
Result = TypeVar("Result")
Context = grpc.aio.ServicerContext[bytes, bytes]
# A method of the service: of one answer, or of a stream that it sends itself.
Method = Callable[[Any, "PublicCall"], Coroutine[Any, Any, Message | None]]


class PublicCall:
    """One call, as the methods of the service see it."""

    def __init__(
        self, context: Context, unread: UnreadBytes, limits: CallLimits, method: str = ""
    ) -> None:
        # Its name, without the service's.
        self.method = method
        self._metadata = {
            name: value
            for name, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        }
        given = self._metadata.get(REQUEST_ID, "")
        # What the client calls it, or a name of our own.
        self.request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        self.head = ((REQUEST_ID, self.request_id),)
        self.reply = ReplyQueue(context, context.peer(), unread, limits, self.head)
        # Who calls, once that is known.
        self.caller = ANYBODY
        self._time_remaining = context.time_remaining
        # What errors call the fields of its request.
        self.names = FIELDS

    def identify(self, keys: KeyStore) -> None:
        """Find out who calls; raises UnauthenticatedError, ForbiddenError."""
        self.caller = caller_of(self._metadata.get, keys)

    @property
    def bearer_token(self) -> str | None:
        """The token for the hub that stands for the caller, a secret; None without one."""
        return bearer_of(self._metadata.get, self.caller)

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """What came with it that tells who calls."""
        return [(name, value) for name, value in self._metadata.items() if name in KEY_NAMES]

    @property
    def timeout_s(self) -> float | None:
        """Seconds until the call's deadline; None: it has none."""
        return self._time_remaining()

    @property
    def origin(self) -> Origin:
        """How it came."""
        return Origin(
            protocol="grpc",
            call=self.method,
            request_id=self.request_id,
            traceparent=self._metadata.get("traceparent", ""),
            tracestate=self._metadata.get("tracestate", ""),
        )

    def send(self, message: Message) -> None:
        """Send a message of a stream; never waits. Raises SlowReaderError."""
        self.reply.put(message.SerializeToString())


class CallBoundary(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Goes around the methods of one service.

    Args:
        service: its full name; other services pass untouched.
        keys: says who calls.
        check_room: raises what any request of a caller would get, before it is read.
        refused: told of errors that come before there is a request, of whose, and how it came.
        counted: names of the methods whose requests are counted.
        passed_on: names of those that somebody else answers, who finds out who calls.
        cut: ends a connection.
    """

    def __init__(
        self,
        service: str,
        limits: CallLimits,
        *,
        keys: KeyStore,
        check_room: Callable[[Caller], None],
        refused: Callable[[BaseException, Caller, Origin], None],
        counted: frozenset[str],
        cut: Callable[[str], object],
        passed_on: frozenset[str] = frozenset(),
    ) -> None:
        self._passed_on = passed_on
        self._prefix = f"/{service}/"
        self._limits = limits
        self._keys = keys
        self._check_room = check_room
        self._refused = refused
        self._counted = counted
        self._cut = cut
        self.unread = UnreadBytes(limits.max_all_unread_bytes, cut)
        self.num_open = 0
        # Calls that have ended and whose clients do not read that they have, by connection.
        self._stuck: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return a method's handler with everything around it."""
        # None where there is no such method, which its type does not say.
        handler: Any = await continuation(handler_call_details)
        name = handler_call_details.method.removeprefix(self._prefix)
        if handler is None or name == handler_call_details.method:
            return handler  # type: ignore[no-any-return]
        method: Method = handler.unary_stream or handler.unary_unary
        is_counted = name in self._counted

        # Reading and writing by hand, which the wire does not show, gives both a time limit.
        async def serve(requests: AsyncIterator[Any], context: Context) -> None:
            call = PublicCall(context, self.unread, self._limits, name)
            await self._serve(method, requests, context, call, is_counted=is_counted)

        return grpc.stream_stream_rpc_method_handler(serve, handler.request_deserializer, None)

    async def _serve(
        self,
        method: Method,
        requests: AsyncIterator[Any],
        context: Context,
        call: PublicCall,
        *,
        is_counted: bool,
    ) -> None:
        self.num_open += 1
        try:
            async with asyncio.timeout(context.time_remaining()):
                if call.method not in self._passed_on:
                    call.identify(self._keys)
                request = await self._read(requests, call, is_counted=is_counted)
                await _answer(method(request, call), call)
        except TimeoutError:
            error = DeadlineError("the time that the client gave it is over")
            await self._refuse(context, error, call)
        except ClientLeftError:
            return
        except LoraxError as error:
            await self._refuse(context, error, call)
        finally:
            self.num_open -= 1
            call.reply.forget()

    async def _refuse(self, context: Context, error: LoraxError, call: PublicCall) -> None:
        """End a call; one that is stuck lasts until its client goes on or is gone."""
        # A client that reads nothing has its status when it goes on, and nothing else.
        call.reply.drop_waiting()
        peer, num_stuck = context.peer(), int(call.reply.is_stuck)
        self._stuck[peer] += num_stuck
        status = rich_status(error, call.request_id, call.names)
        try:
            trailers = (*status.trailing_metadata, *call.head, *pushback(error))
            await context.abort(status.code, status.details, trailers)
        finally:
            self._stuck[peer] -= num_stuck
            if not self._stuck[peer]:
                del self._stuck[peer]

    def _check_place(self) -> None:
        """Raise OverloadedError when too many calls are open; where some are stuck, they go."""
        if self.num_open <= self._limits.max_calls:
            return
        ((peer, number),) = self._stuck.most_common(1) or [("", 0)]
        if number:
            self._cut(peer)
        raise OverloadedError("too many calls", public="")

    async def _read(
        self, requests: AsyncIterator[Any], call: PublicCall, *, is_counted: bool
    ) -> Message:
        """Return the request of a call that there is place for; what fails here is counted here."""
        try:
            self._check_place()
            if is_counted:
                self._check_room(call.caller)
            return await self._first(requests)
        except (LoraxError, asyncio.CancelledError) as error:
            if is_counted:
                self._refused(error, call.caller, call.origin)
            raise

    async def _first(self, requests: AsyncIterator[Any]) -> Message:
        reading = asyncio.timeout(self._limits.client_timeout_s)
        try:
            async with reading:
                request: Message = await anext(requests)
                return request
        except StopAsyncIteration:
            raise BadRequestError("the call ended without a request") from None
        except DecodeError:
            raise BadRequestError("the request is not the message that this method takes") from None
        except TimeoutError:
            if not reading.expired():
                raise
            raise SlowRequestError("the request did not come in time") from None


async def _answer(work: Coroutine[Any, Any, Message | None], call: PublicCall) -> None:
    """Run a method while its messages are written; those of one that fails are written, too."""
    failure: LoraxError | None = None
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(call.reply.write_all())
            try:
                if (answer := await work) is not None:
                    call.send(answer)
            except SlowReaderError:
                raise
            except LoraxError as error:
                failure = error
            except Exception:
                logger.exception("unexpected error in a call")
                failure = LoraxError(public="")
            call.reply.close()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    if failure is not None:
        raise failure
