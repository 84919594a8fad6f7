"""What a front does not answer itself: the whole call goes to the core, and its answer back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorax_contract.errors import ReplicaLostError
from lorax_router.fronts.faults import pack_fault, unpack_fault
from lorax_router.fronts.messages import (
    AskCall,
    CallPart,
    FromFront,
    PullPart,
    TellCall,
    TellFault,
    Withdraw,
    encode,
)
from lorax_router.http_api.responses import error_response
from lorax_router.service.adapters.managed import call_stamp

# A link carries these beside the service's numbers, which begin below.
FIRST_NUMBER = 1 << 46


class ForwardedCalls:
    """An application that has the core answer.

    Args:
        send: takes messages to the core.
    """

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send_bytes = send
        self._numbers = itertools.count(FIRST_NUMBER)
        self._open: dict[int, _Forwarded] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call with what the core says."""
        number = next(self._numbers)
        call = self._open[number] = _Forwarded(number, receive, self._send)
        self._send(_head(number, scope))
        try:
            answer = await call.answer
        except asyncio.CancelledError:
            self._send(Withdraw(number))
            raise
        finally:
            del self._open[number]
            call.close()
        if isinstance(answer, TellFault):
            await error_response(unpack_fault(answer.fault))(scope, receive, send)
            return
        response = Response(answer.body, answer.status)
        response.raw_headers = answer.headers
        await response(scope, receive, send)

    def take(self, message: PullPart | TellCall | TellFault) -> None:
        """Take a message of the core's."""
        call = self._open.get(message.number)
        if call is None:
            return
        if isinstance(message, PullPart):
            call.pull()
        elif not call.answer.done():
            call.answer.set_result(message)

    def lose(self) -> None:
        """The core is gone: what it did not answer fails."""
        fault = pack_fault(ReplicaLostError(public=""))
        for number in [*self._open]:
            self.take(TellFault(number, fault))

    def _send(self, message: FromFront) -> None:
        self._send_bytes(encode(message))


class _Forwarded:
    """One call that the core answers."""

    def __init__(self, number: int, receive: Receive, send: Callable[[FromFront], None]) -> None:
        self._number = number
        self._receive = receive
        self._send = send
        loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[TellCall | TellFault] = loop.create_future()
        self._receiving: set[asyncio.Task[None]] = set()

    def pull(self) -> None:
        """Receive once for the application in the core."""
        task = asyncio.get_running_loop().create_task(self._pass_on())
        self._receiving.add(task)
        task.add_done_callback(self._receiving.discard)

    def close(self) -> None:
        """End what still receives."""
        for task in self._receiving:
            task.cancel()

    async def _pass_on(self) -> None:
        message = await self._receive()
        is_gone = message["type"] == "http.disconnect"
        body, has_more = message.get("body", b""), message.get("more_body", False)
        self._send(CallPart(self._number, body, has_more, is_gone))


def _head(number: int, scope: Scope) -> AskCall:
    client, server = scope.get("client"), scope.get("server")
    return AskCall(
        number,
        scope["method"],
        scope["scheme"],
        scope["http_version"],
        scope["path"],
        scope["raw_path"],
        scope["query_string"],
        [(bytes(name), bytes(value)) for name, value in scope["headers"]],
        None if client is None else (client[0], client[1]),
        None if server is None else (server[0], server[1]),
        call_stamp.get(),
    )
