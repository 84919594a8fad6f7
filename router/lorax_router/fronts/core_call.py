"""A call that another process received, answered by the application of this one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Scope

from lorax_router.fronts.messages import AskCall, CallPart, FromCore, PullPart, TellCall


class CoreCall:
    """One call: runs the application, which finds it as any other.

    Args:
        asked: the head of the call.
        send: takes messages to the front that has the client.
    """

    def __init__(self, asked: AskCall, send: Callable[[FromCore], None]) -> None:
        self._asked = asked
        self._send = send
        self._parts: asyncio.Queue[CallPart] = asyncio.Queue()
        self._status = 500
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = bytearray()

    def put(self, part: CallPart) -> None:
        """Take what the front received."""
        self._parts.put_nowait(part)

    async def run(self, app: ASGIApp) -> None:
        """Let an application answer, and tell the whole answer."""
        await app(self._scope(), self._receive, self._take)
        headers = [(bytes(name), bytes(value)) for name, value in self._headers]
        self._send(TellCall(self._asked.number, self._status, headers, bytes(self._body)))

    def _scope(self) -> Scope:
        asked = self._asked
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": asked.http_version,
            "method": asked.method,
            "scheme": asked.scheme,
            "path": asked.path,
            "raw_path": asked.raw_path,
            "query_string": asked.query,
            "root_path": "",
            "headers": asked.headers,
            "client": asked.client,
            "server": asked.server,
            "state": {},
        }

    async def _receive(self) -> Message:
        """Return what the front receives next: a body is read where it is wanted, and not before."""
        self._send(PullPart(self._asked.number))
        part = await self._parts.get()
        if part.is_gone:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part.body, "more_body": part.has_more}

    async def _take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], [*message.get("headers", ())]
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
