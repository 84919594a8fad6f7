"""A replica on another machine: attached, asked how it is, and attached again when it was lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ssl import SSLContext
from time import monotonic
from typing import Protocol

from lorax_contract.adapters import AdapterRef
from lorax_ingress.routing.values import ReplicaView
from lorax_router.fronts.core_facts import CoreFacts, CoreLoad
from lorax_router.fronts.forwarding import FIRST_NUMBER, ForwardedCalls
from lorax_router.fronts.link import Link
from lorax_router.fronts.messages import (
    PROTOCOL,
    AskFacts,
    AskLoad,
    PullPart,
    TellAliases,
    TellCall,
    TellFacts,
    TellFault,
    TellLoad,
    TellStop,
    decode_down,
    encode,
)
from lorax_router.fronts.remote import RemoteService
from lorax_router.service.chat.parser_book import ParserBook

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachSettings:
    """How often, and how long."""

    # Between two questions how much a replica has to do.
    gossip_s: float = 0.25
    # A replica that answers nothing for so long is taken for lost.
    silence_s: float = 10.0
    # Between two tries to reach one: at first, and at most.
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    connect_s: float = 5.0


class Attachments(Protocol):
    """Who hears of replicas."""

    def attached(self, replica: AttachedReplica) -> None:
        """A replica is there; nothing was heard of its load yet."""

    def seen(self, view: ReplicaView) -> None:
        """A replica said how much it has to do."""

    def gave(self, name: str, served: Mapping[str, float], taken: Mapping[str, float]) -> None:
        """A replica said what each tenant got of it so far, and what of that has quotas."""

    def given_elsewhere(self, name: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return the same of the others, as far as that grew since it was asked last."""

    def queued(self, name: str, depths: Mapping[str, tuple[int, int]]) -> None:
        """A replica said what each tenant has waiting there, requests and tokens."""

    def queued_elsewhere(self, name: str) -> dict[str, tuple[int, int]]:
        """Return what each tenant has waiting at the others together."""

    def knows(self, name: str, digest: int | None) -> None:
        """A replica said what stands for all that was managed by hand there."""

    def lost(self, name: str) -> None:
        """A replica is gone; all that it was asked has failed, or fails next."""

    def tell_aliases(
        self, name: str, known: list[str], dropped: list[str], targets: list[str]
    ) -> None:
        """Names mean an adapter at a replica from now on, or do no more."""


class AttachedReplica:
    """One replica, for as long as it is wanted.

    Args:
        name: what it is called everywhere.
        uri: ``unix:PATH`` or ``HOST:PORT``.
        hears: who hears of it.
        parsers: those that answers may need.
        ingress: what this ingress is called, in its logs.
        tls: for TCP; None: plain.
        host: the name in the server's certificate; "": that of the URI.
        clock: monotonic seconds, those of views.
    """

    def __init__(
        self,
        name: str,
        uri: str,
        hears: Attachments,
        parsers: ParserBook,
        *,
        ingress: str = "ingress",
        tls: SSLContext | None = None,
        host: str = "",
        settings: AttachSettings | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.name = name
        self.uri = uri
        self._hears = hears
        self._ingress = ingress
        self._tls = tls
        self._host = host
        self._settings = settings or AttachSettings()
        self._clock = clock
        self._link = Link(_ignore, _ignore)
        self.service = self.messages = self.managing = RemoteService(self._send, parsers)
        self.calls = ForwardedCalls(self._send)
        # Of the connection that there is.
        self._facts: CoreFacts | None = None
        self._gone = asyncio.Event()
        self._numbers = itertools.count(1)
        # When each question that has no answer was asked; how often it was looked since anything came.
        self._asked: dict[int, float] = {}
        self._num_silent = 0

    def preload(self, refs: list[AdapterRef]) -> None:
        """Tell it which adapters requests may come for, the likeliest first."""
        self.service.preload(refs)

    @property
    def facts(self) -> CoreFacts | None:
        """What it serves; None: it is not attached."""
        return self._facts

    async def run(self) -> None:
        """Keep it attached until the task is cancelled."""
        pause_s = self._settings.first_pause_s
        while True:
            try:
                was_attached = await self._stay()
            except (OSError, TimeoutError) as error:
                logger.debug("replica %s cannot be reached: %s", self.name, error)
                was_attached = False
            if was_attached:
                pause_s = self._settings.first_pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._settings.longest_pause_s)

    async def _stay(self) -> bool:
        """Connect and return once that is over: whether it was attached meanwhile."""
        self._gone.clear()
        self._asked.clear()
        async with asyncio.timeout(self._settings.connect_s):
            self._link = await self._connect()
        self._num_silent = 0
        self._link.send(encode(AskFacts(PROTOCOL, self._ingress)))
        try:
            await self._watch()
        finally:
            self._link.close()
            was_attached = self._lose()
        return was_attached

    async def _connect(self) -> Link:
        loop = asyncio.get_running_loop()
        kind, _, path = self.uri.partition(":")
        if kind == "unix":
            _, link = await loop.create_unix_connection(self._new_link, path)
            return link
        address, _, port = self.uri.rpartition(":")
        address = address.strip("[]")
        host = None if self._tls is None else self._host or address
        _, link = await loop.create_connection(
            self._new_link, address, int(port), ssl=self._tls, server_hostname=host
        )
        return link

    def _new_link(self) -> Link:
        return Link(self._take, self._gone.set)

    async def _watch(self) -> None:
        """Ask now and then how it is; returns when it is gone or says nothing.

        Looks are counted, not seconds: while this process stands still, nobody is silent.
        """
        most = self._settings.silence_s / self._settings.gossip_s
        while not self._gone.is_set():
            self._num_silent += 1
            if self._num_silent > most + 1:
                logger.warning("replica %s says nothing; it is taken for lost", self.name)
                return
            # One that is behind with its answers is not asked for more of them.
            if self._facts is not None and not self._asked:
                number = next(self._numbers)
                self._asked[number] = self._clock()
                served, taken = self._hears.given_elsewhere(self.name)
                queued = self._hears.queued_elsewhere(self.name)
                self._send(encode(AskLoad(number, served, taken, queued)))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.gossip_s):
                    await self._gone.wait()

    def _lose(self) -> bool:
        if self._facts is None:
            return False
        self._facts = None
        logger.warning("replica %s is lost", self.name)
        # Before those who asked it ask where else to go.
        self._hears.lost(self.name)
        self.service.lose()
        self.calls.lose()
        return True

    # --- what it says -----------------------------------------------------------------

    def _take(self, data: memoryview) -> None:
        self._num_silent = 0
        match message := decode_down(data):
            case TellFacts(_, facts):
                self._facts = facts
                logger.info("replica %s is attached", self.name)
                self._hears.attached(self)
            case TellLoad(number, load):
                self._see(self._asked.pop(number), load)
            case TellAliases(known, dropped, targets):
                self._hears.tell_aliases(self.name, known, dropped, targets)
            case PullPart() | TellCall():
                self.calls.take(message)
            case TellFault(number) if number >= FIRST_NUMBER:
                self.calls.take(message)
            case TellStop():
                pass
            case _:
                self.service.take(message)

    def _see(self, asked_at: float, load: CoreLoad) -> None:
        self._hears.gave(self.name, load.served, load.taken)
        self._hears.queued(self.name, load.queued)
        self._hears.knows(self.name, load.managed)
        self._hears.seen(
            ReplicaView(
                name=self.name,
                taken_at=asked_at,
                is_accepting=load.is_accepting,
                num_slots=load.num_slots,
                resident=frozenset(load.resident),
                hosted=frozenset(load.hosted),
                num_running=load.num_running,
                num_queued=load.num_queued,
                num_queued_tokens=load.num_queued_tokens,
                kv_in_use=load.kv_in_use,
            )
        )

    def _send(self, message: bytes) -> None:
        self._link.send(message)


def _ignore(*_: object) -> None:
    """Nobody is there to hear it."""
