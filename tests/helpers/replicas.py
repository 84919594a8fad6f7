"""Replicas in one event loop: whole routers over FakeShards, attached to one fleet by messages."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

from tests.helpers.adapter_world import AdapterWorld, adapter_world
from tests.helpers.fronts import MemoryLink

from lorax_ingress.fleet import Fleet
from lorax_ingress.routing.router import AffineRouter
from lorax_ingress.routing.values import ReplicaView
from lorax_ingress.service import ReplicatedService
from lorax_router.fronts.core_facts import CoreFacts
from lorax_router.fronts.desk import CoreParts, FrontDesk
from lorax_router.fronts.forwarding import ForwardedCalls
from lorax_router.fronts.messages import decode_down
from lorax_router.fronts.remote import RemoteService
from lorax_router.grpc_api.unary import UnaryCalls
from lorax_router.service.adapters.preloading import Preloader
from lorax_router.service.adapters.taking_over import ManagedKeeper
from lorax_router.service.chat.parser_book import ParserBook

FACTS = CoreFacts(
    model_id="fake", served_model_names=[], model_device_type="cpu", max_total_tokens=200,
    max_body_bytes=1 << 20, default_adapter_source="local", adapter_refusal=None,
    takes_messages=True, takes_changes=True, takes_preloads=True,
)  # fmt: skip
ADAPTERS = ("poet", "pirate")


class LocalReplica:
    """A world, and the link to it; kill it and nothing more comes from it."""

    def __init__(self, name: str, world: AdapterWorld) -> None:
        self.name = name
        self.world = world
        self.is_alive = True
        parts = CoreParts(
            service=world.parts.service, counts=world.parts.service.ledger,
            app=world.client._transport.app,  # type: ignore[attr-defined]
            aliases=world.parts.selections.aliases,
            messages=UnaryCalls(world.parts.servicer, world.parts.keys),
            managed=ManagedKeeper(world.parts.adapters, world.parts.selections.aliases),
            preloads=Preloader(world.parts.adapters.directory, world.parts.engine),
        )  # fmt: skip
        self._down = MemoryLink(self._hear)
        self.desk = FrontDesk(parts, self._down.send, lambda: None, lambda count: None)
        self._up = MemoryLink(self._take)
        self.service = self.messages = self.managing = RemoteService(self._up.send, ParserBook())
        self.calls = ForwardedCalls(self._up.send)
        self.facts = FACTS
        self.preload = self.service.preload

    def _take(self, data: memoryview) -> None:
        if self.is_alive:
            self.desk.take(data)

    def _hear(self, data: memoryview) -> None:
        if self.is_alive:
            self.service.take(decode_down(data))  # type: ignore[arg-type]

    def view(self, **values: Any) -> ReplicaView:
        """What it says of itself."""
        taken_at = asyncio.get_running_loop().time()
        return ReplicaView(name=self.name, taken_at=taken_at, num_slots=4, **values)

    async def kill(self) -> None:
        """It is gone, with all that it was to say."""
        self.is_alive = False
        self.service.lose()
        await self.desk.close()


class Replicas:
    """A fleet of replicas with the service over it."""

    def __init__(self, seed: int, wait_s: float) -> None:
        draw = random.Random(seed)
        clock = asyncio.get_running_loop().time
        self.fleet = Fleet(
            AffineRouter(draw.randrange), wait_s=wait_s, clock=clock,
        )  # fmt: skip
        self.service = ReplicatedService(self.fleet, clock)
        self.by_name: dict[str, LocalReplica] = {}

    def attach(self, replica: LocalReplica) -> None:
        self.by_name[replica.name] = replica
        self.fleet.attached(replica)
        self.fleet.seen(replica.view())

    async def kill(self, name: str) -> None:
        replica = self.by_name.pop(name)
        self.fleet.lost(name)
        await replica.kill()

    def places(self) -> list[str]:
        """Where the requests are that run, the first first."""
        return [*self.fleet._router._places.values()]


@contextlib.asynccontextmanager
async def replicas(
    num: int, *, seed: int = 0, wait_s: float = 5.0, **config: Any
) -> AsyncIterator[Replicas]:
    """So many replicas; what is killed leaves nothing inside."""
    async with contextlib.AsyncExitStack() as stack:
        made = Replicas(seed, wait_s)
        for number in range(num):
            world = await stack.enter_async_context(adapter_world(**config))
            # What a FakeShard computes depends on the handle: everywhere the same.
            for adapter in ADAPTERS:
                await world.generate(adapter, 1)
            made.attach(LocalReplica(f"r{number}", world))
        try:
            yield made
        finally:
            for replica in made.by_name.values():
                await replica.desk.close()
