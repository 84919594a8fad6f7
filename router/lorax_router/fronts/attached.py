"""Fronts of other processes and machines: ingresses, which have many cores, and this is one of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from ssl import SSLContext

from lorax_router.fronts.core_facts import CoreFacts
from lorax_router.fronts.desk import CoreParts, FrontDesk
from lorax_router.fronts.elsewhere import QueuedElsewhere, ServiceElsewhere
from lorax_router.fronts.link import Link
from lorax_router.fronts.load import LoadTeller
from lorax_router.fronts.messages import (
    PROTOCOL,
    AskFacts,
    AskLoad,
    TellFacts,
    TellLoad,
    decode_up,
    encode,
)
from lorax_router.http_api.listeners import bind_unix

logger = logging.getLogger(__name__)


class AttachedFronts:
    """Serves whoever attaches to an address; what they say of their callers is believed.

    Args:
        parts: what the core does for them.
        facts: what does not change of it.
        load: says how much it has to do.
    """

    def __init__(self, parts: CoreParts, facts: CoreFacts, load: LoadTeller) -> None:
        self.parts = parts
        self.facts = facts
        self.load = load
        self.elsewhere = ServiceElsewhere(load.engine.served_elsewhere)
        self.taken = ServiceElsewhere(load.meters.take_elsewhere)
        self.queued = QueuedElsewhere(load.engine.queued_elsewhere)
        self._open: set[_Attached] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._bound = ExitStack()

    async def listen(self, uri: str, tls: SSLContext | None = None) -> int:
        """Listen at ``unix:PATH`` or ``HOST:PORT``; returns the port, 0 of a path. Raises OSError.

        A path is this user's alone.
        """
        loop = asyncio.get_running_loop()
        kind, _, path = uri.partition(":")
        if kind == "unix":
            listener = self._bound.enter_context(bind_unix(path))
            self._server = await loop.create_unix_server(self._accept, sock=listener)
            return 0
        host, _, port = uri.rpartition(":")
        self._server = await loop.create_server(
            self._accept, host.strip("[]"), int(port), ssl=tls, reuse_address=True
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Accept nothing more and end all links; what they asked for is cancelled."""
        if self._server is not None:
            self._server.close()
        self._bound.close()
        for each in [*self._open]:
            each.link.close()
        await asyncio.sleep(0)
        await asyncio.gather(*self._closing)
        await self.load.close()
        for worker in (self.parts.preloads, self.parts.managed):
            if worker is not None:
                await worker.close()

    def _accept(self) -> Link:
        attached = _Attached(self, self._forget)
        self._open.add(attached)
        return attached.link

    def _forget(self, attached: _Attached) -> None:
        self._open.discard(attached)
        self.queued.forget(attached)
        task = asyncio.get_running_loop().create_task(attached.desk.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Attached:
    """One link. Its first message asks for the facts, in a protocol that both know."""

    def __init__(self, fronts: AttachedFronts, on_end: Callable[[_Attached], None]) -> None:
        self._fronts = fronts
        self._name = ""
        self._is_known = False
        self.link = Link(self._take, lambda: on_end(self))
        self.desk = FrontDesk(fronts.parts, self.link.send, _nothing, _nothing)
        self._served, self._taken = fronts.elsewhere.teller(), fronts.taken.teller()

    def _take(self, data: memoryview) -> None:
        if not self._is_known:
            self._begin(data)
            return
        message = decode_up(data)
        if isinstance(message, AskLoad):
            self._served.tell(message.elsewhere)
            self._taken.tell(message.taken_elsewhere)
            self._fronts.queued.tell(self, message.queued_elsewhere)
            self.link.send(encode(TellLoad(message.number, self._fronts.load.now())))
        else:
            self.desk.do(message)

    def _begin(self, data: memoryview) -> None:
        message = decode_up(data)
        if not isinstance(message, AskFacts) or message.protocol != PROTOCOL:
            logger.error("an ingress speaks another protocol; its link is ended")
            self.link.close()
            return
        self._name, self._is_known = message.name, True
        logger.info("ingress %s is attached", self._name)
        self.link.send(encode(TellFacts(PROTOCOL, self._fronts.facts)))
        self.desk.open()


def _nothing(*_: object) -> None:
    """A front that another process has needs nothing done."""
