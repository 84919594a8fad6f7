"""What does not generate: one replica answers, or all do what manages adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorax_contract.errors import PayloadTooLargeError, UnhealthyError
from lorax_ingress.fleet import Fleet
from lorax_router.http_api.responses import error_response

# A POST to these changes what a server has: it is every replica's.
_MANAGING = ("/v1/adapters/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
# Of these, what is done where there is nothing to do.
_TAKING_BACK = (
    "/v1/adapters/unload", "/v1/adapters/unpin", "/v1/adapters/reload", "/v1/unload_lora_adapter",
)  # fmt: skip
_NOT_LOADED = 404


class IngressCalls:
    """Answers health and metrics by itself, and has replicas answer all other calls.

    Args:
        fleet: the replicas.
        own: applications of this process, by path.
        max_body_bytes: of a body that all replicas get.
    """

    def __init__(self, fleet: Fleet, own: Mapping[str, ASGIApp], max_body_bytes: int) -> None:
        self._fleet = fleet
        self.own = dict(own)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call."""
        if (own := self.own.get(scope["path"])) is not None:
            await own(scope, receive, send)
        elif not self._fleet.replicas:
            await error_response(_nobody())(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"].startswith(_MANAGING):
            await self._all(scope, receive, send)
        else:
            replica = self._fleet.lightest(self._fleet.replicas.values())
            await replica.calls(scope, receive, send)

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 while some replica takes requests."""
        answer = Response() if self._fleet.is_open else error_response(_nobody())
        await answer(scope, receive, send)

    async def _all(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a call to every replica; what went wrong at one is the answer."""
        try:
            body = await self._body(receive)
        except PayloadTooLargeError as error:
            await error_response(error)(scope, receive, send)
            return
        async with self._fleet.managed.changing():
            answers = await self._answers(scope, body)
        if not answers:
            await error_response(_nobody())(scope, receive, send)
            return
        if scope["path"] in _TAKING_BACK:
            # An adapter that requests brought need not be everywhere.
            answers = [each for each in answers if each.status != _NOT_LOADED] or answers
        worst = max(answers, key=lambda each: each.status)
        response = Response(worst.body, worst.status)
        response.raw_headers = worst.headers
        await response(scope, receive, send)

    async def _answers(self, scope: Scope, body: bytes) -> list[_HeldResponse]:
        answers = [_HeldResponse() for _ in self._fleet.replicas]
        calls = [
            replica.calls(scope, _Once(body).receive, kept.send)
            for replica, kept in zip(self._fleet.replicas.values(), answers, strict=True)
        ]
        await asyncio.gather(*calls)
        return answers

    async def _body(self, receive: Receive) -> bytes:
        body, has_more = b"", True
        while has_more:
            message = await receive()
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                raise PayloadTooLargeError(f"the body has more than {self._max_body_bytes} bytes")
        return body


@dataclass(slots=True)
class _Once:
    """A body that was read, for one more reader."""

    body: bytes
    is_read: bool = False

    async def receive(self) -> Message:
        """Give the body, then nothing until the call is over."""
        if self.is_read:
            await asyncio.get_running_loop().create_future()
        self.is_read = True
        return {"type": "http.request", "body": self.body, "more_body": False}


@dataclass(slots=True)
class _HeldResponse:
    """A response that is not sent yet."""

    status: int = 0
    headers: list[Any] = field(default_factory=list)
    body: bytes = b""

    async def send(self, message: Message) -> None:
        """Take a part of it."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            self.body += message.get("body", b"")


def _nobody() -> UnhealthyError:
    text = "no replica is attached that takes requests"
    return UnhealthyError(text, public=text)
