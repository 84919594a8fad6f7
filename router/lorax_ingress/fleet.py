"""The replicas that are attached, and which of them a request goes to."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from time import monotonic
from typing import Protocol

from cachetools import LRUCache
from starlette.types import ASGIApp

from lorax_contract.adapters import TOKEN_SOURCES, AdapterRef
from lorax_contract.errors import LoraxError, ReplicaLostError, UnhealthyError, ValidationError
from lorax_ingress.aliases import ReplicaAliases
from lorax_ingress.exchange import ManagedExchange, ManagedReplica
from lorax_ingress.routing.router import AffineRouter
from lorax_ingress.routing.shares import QueueExchange, ServiceExchange
from lorax_ingress.routing.values import ReplicaView, RouteRequest
from lorax_ingress.watching import IngressMetrics
from lorax_router.fronts.core_facts import CoreFacts
from lorax_router.fronts.desk import MessageCalls
from lorax_router.http_api.json_text import dumps
from lorax_router.service.adapters.selection import SelectionPolicy, place_key
from lorax_router.service.generation import GenerationService
from lorax_router.service.requests import ChatPrompt, GenerateRequest, TextPrompt

logger = logging.getLogger(__name__)

# Characters of a prompt that are taken for a block of its prefix, and for a token.
_BLOCK_CHARS = 64
_CHARS_PER_TOKEN = 4
_MAX_BLOCKS = 64
# Names of adapters that are kept, to have them loaded elsewhere.
_MAX_NAMES = 20_000


class Replica(ManagedReplica, Protocol):
    """One server that is attached."""

    @property
    def service(self) -> GenerationService:
        """What generates there."""

    @property
    def calls(self) -> ASGIApp:
        """What answers there all that does not generate."""

    @property
    def messages(self) -> MessageCalls:
        """What answers there calls over gRPC that do not generate."""

    def preload(self, refs: list[AdapterRef]) -> None:
        """Tell it which adapters requests may come for, the likeliest first."""


class Fleet:
    """All replicas that are attached, and the requests that they were sent.

    Args:
        router: decides.
        metrics: counts what is decided.
        wait_s: seconds that a request waits for a replica to take it, where none does.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        router: AffineRouter,
        metrics: IngressMetrics | None = None,
        *,
        wait_s: float = 60.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._router = router
        self._metrics = metrics or IngressMetrics()
        # Those of the first replica that came; others serve the same, or nothing.
        self.facts: CoreFacts | None = None
        # Once one of them takes requests.
        self.is_known = asyncio.Event()
        self.selections = SelectionPolicy()
        self._wait_s = wait_s
        self._clock = clock
        self.replicas: dict[str, Replica] = {}
        self._views = self._metrics.views
        self.aliases = ReplicaAliases()
        self.managed = ManagedExchange(self.replicas, clock)
        self._numbers = itertools.count(1)
        self._change = asyncio.Event()
        self._shares, self._quotas = ServiceExchange(), ServiceExchange()
        self._queued = QueueExchange()
        # What adapters are called by requests that bring no token.
        self._names: LRUCache[str, AdapterRef] = LRUCache(_MAX_NAMES)

    # --- what happens to replicas -----------------------------------------------------

    def attached(self, replica: Replica) -> None:
        """A replica is there; it takes requests once it was seen."""
        facts = replica.facts
        assert facts is not None
        if self.facts is None:
            self.facts = facts
            self.selections = SelectionPolicy(
                refusal=facts.adapter_refusal,
                default_source=facts.default_adapter_source,
                aliases=self.aliases.book,
            )
        if facts.model_id != self.facts.model_id:
            text = "replica %s serves %s, the others %s: it gets no requests"
            logger.error(text, replica.name, facts.model_id, self.facts.model_id)
            return
        self.replicas[replica.name] = replica
        self.managed.attached(replica)
        self._metrics.attached(replica.name)
        self._shares.join(replica.name)
        self._quotas.join(replica.name)

    def seen(self, view: ReplicaView) -> None:
        """A replica said how much it has to do."""
        if view.name not in self.replicas:
            return
        self._views[view.name] = view
        self._router.see(view)
        self._preload()
        if view.is_accepting:
            self.is_known.set()
            self._change.set()

    def gave(self, name: str, served: Mapping[str, float], taken: Mapping[str, float]) -> None:
        """A replica said what each tenant got of it so far, and what of that has quotas."""
        if name in self.replicas:
            self._shares.report(name, served)
            self._quotas.report(name, taken)

    def given_elsewhere(self, name: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return the same of the others, as far as that grew since it was asked last."""
        return self._shares.elsewhere(name), self._quotas.elsewhere(name)

    def queued(self, name: str, depths: Mapping[str, tuple[int, int]]) -> None:
        """A replica said what each tenant has waiting there, requests and tokens."""
        if name in self.replicas:
            self._queued.report(name, depths)

    def queued_elsewhere(self, name: str) -> dict[str, tuple[int, int]]:
        """Return what each tenant has waiting at the others together."""
        return self._queued.elsewhere(name)

    def knows(self, name: str, digest: int | None) -> None:
        """A replica said what stands for all that was managed by hand there."""
        if name in self.replicas:
            self.managed.knows(name, digest)

    def lost(self, name: str) -> None:
        """A replica is gone; all that it was asked has failed, or fails next."""
        if self.replicas.pop(name, None) is not None:
            self._shares.leave(name)
            self._quotas.leave(name)
            self._queued.leave(name)
            self.managed.lost(name)
            self._views.pop(name, None)
            self._router.forget(name)
            self._metrics.lost(name)
            self.aliases.forget(name)
            self._preload()

    def _preload(self) -> None:
        """Have replicas load what they become homes of, before requests for it come there."""
        told: dict[str, list[AdapterRef]] = {}
        for name, adapter in self._router.take_preloads():
            if (ref := self._names.get(adapter)) is not None:
                told.setdefault(name, []).append(ref)
        for name, refs in told.items():
            replica = self.replicas.get(name)
            if replica is not None and replica.facts is not None and replica.facts.takes_preloads:
                replica.preload(refs)
                self._metrics.preloaded(name, len(refs))

    def tell_aliases(
        self, name: str, known: list[str], dropped: list[str], targets: list[str]
    ) -> None:
        """Names mean an adapter at a replica from now on, or do no more."""
        if name in self.replicas:
            self.aliases.tell(name, known, dropped, targets)

    def stop_sending(self, name: str) -> None:
        """A replica takes nothing more until it says otherwise."""
        if (view := self._views.get(name)) is not None and view.is_accepting:
            self.seen(replace(view, is_accepting=False, taken_at=self._clock()))

    # --- where requests go ------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether some replica takes requests."""
        return any(view.is_accepting for view in self._views.values())

    def lightest(self, replicas: Iterable[Replica]) -> Replica:
        """Return that of some with the fewest requests, of those that take some if there are any."""
        return min(replicas, key=self._load)

    def _load(self, replica: Replica) -> tuple[bool, int]:
        view = self._views.get(replica.name)
        return (True, 0) if view is None else (not view.is_accepting, view.num_running)

    async def choose(self, request: GenerateRequest) -> Chosen:
        """Choose a replica and count the request there; UnhealthyError: none takes it in time."""
        asked = self._route_request(request)
        try:
            async with asyncio.timeout(self._wait_s):
                while (decision := self._router.route(asked, self._clock())) is None:
                    self._change.clear()
                    await self._change.wait()
        except TimeoutError:
            text = f"no replica took the request for {self._wait_s:g} s"
            raise UnhealthyError(text, public=text) from None
        self._metrics.routed(decision)
        number = str(next(self._numbers))
        self._router.sent(number, asked, decision.replica, self._clock())
        if decision.preload_at is not None and asked.adapter is not None:
            self._router.preloads_at(asked.adapter, decision.preload_at, self._clock())
            self._preload()
        return Chosen(self, self.replicas[decision.replica], number)

    def begins(self, number: str) -> None:
        """A request has its first token."""
        self._router.begins(number)

    def resumed(self) -> None:
        """A request that was lost with a replica is asked of another one."""
        self._metrics.resumed()

    def ends(self, number: str) -> None:
        """A request is over, whichever way."""
        self._router.ended(number, self._clock())

    def _route_request(self, request: GenerateRequest) -> RouteRequest:
        prompt, salt = request.prompt, request.parameters.cache_salt or ""
        if isinstance(prompt, TextPrompt):
            data = (prompt.text + (prompt.second or "")).encode("utf-8", "replace")
        elif isinstance(prompt, ChatPrompt):
            data = dumps([prompt.tools, prompt.messages])
        else:
            data = dumps([*prompt.ids])
        adapter, can_preload = self._adapter(request)
        return RouteRequest(
            adapter=adapter,
            can_preload=can_preload,
            tenant=request.caller.tenant,
            num_prompt_tokens=len(data) // _CHARS_PER_TOKEN,
            prefix=tuple(_blocks(data, salt)),
        )

    def _adapter(self, request: GenerateRequest) -> tuple[str | None, bool]:
        """Return what an adapter is called everywhere, and whether it may be loaded for nobody.

        That is one that a request asks for without a token. What is wrong with a name, the replica
        says.
        """
        try:
            selection = self.selections.selection_of(request.parameters)
        except ValidationError:
            return None, False
        if selection is None:
            return None, False
        key = place_key(selection, self.aliases.stands_for)
        token = selection.token
        if any(ref.source in TOKEN_SOURCES for ref in selection.refs):
            token = token or request.caller.api_token
        can_preload = token is None and selection.merge is None
        if can_preload:
            self._names[key] = selection.refs[0]
        return key, can_preload


@dataclass(slots=True)
class Chosen:
    """A replica that was chosen for a request; a Ticket."""

    fleet: Fleet
    replica: Replica
    number: str

    @property
    def service(self) -> GenerationService:
        """What generates there."""
        return self.replica.service

    def begins(self) -> None:
        """The request has its first token."""
        self.fleet.begins(self.number)

    def ends(self) -> None:
        """The request is over; more than once does nothing."""
        self.fleet.ends(self.number)

    def fails(self, error: LoraxError) -> None:
        """The replica does not do it; unless it is gone, it is asked for nothing more for now."""
        self.ends()
        if not isinstance(error, ReplicaLostError):
            self.fleet.stop_sending(self.replica.name)


def _blocks(data: bytes, salt: str) -> Iterator[bytes]:
    """Yield a hash of all up to the end of each of the first full blocks."""
    digest = blake2b(salt.encode(), digest_size=8)
    for start in range(0, min(len(data), _MAX_BLOCKS * _BLOCK_CHARS), _BLOCK_CHARS):
        block = data[start : start + _BLOCK_CHARS]
        if len(block) == _BLOCK_CHARS:
            digest.update(block)
            yield digest.digest()
