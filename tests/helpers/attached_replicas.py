"""Replicas behind sockets in one event loop, and an ingress without its HTTP that attaches to them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

from tests.helpers.adapter_world import AdapterWorld, adapter_world
from tests.helpers.replicas import FACTS

from lorax_ingress.attaching import AttachedReplica, AttachSettings
from lorax_ingress.fleet import Fleet
from lorax_ingress.routing.router import AffineRouter
from lorax_ingress.service import ReplicatedService
from lorax_router.fronts.attached import AttachedFronts
from lorax_router.fronts.desk import CoreParts
from lorax_router.fronts.load import LoadTeller
from lorax_router.service.adapters.preloading import Preloader
from lorax_router.service.adapters.taking_over import ManagedKeeper
from lorax_router.service.chat.parser_book import ParserBook
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt
from lorax_router.shards.fake.shard import FakeModel, FakeShard

QUICK = AttachSettings(gossip_s=0.02, silence_s=0.5, first_pause_s=0.02, longest_pause_s=0.05)


def fronts_of(world: AdapterWorld, *, by_admin: bool = False) -> AttachedFronts:
    """Let fronts attach; ``by_admin``: all of their calls are the operator's."""
    parts = world.parts
    app = parts.admin_app if by_admin else parts.app
    core = CoreParts(
        service=parts.service, counts=parts.service.ledger, app=app,
        aliases=parts.selections.aliases,
        managed=ManagedKeeper(parts.adapters, parts.selections.aliases),
        preloads=Preloader(parts.adapters.directory, parts.engine),
    )  # fmt: skip
    load = LoadTeller(
        parts.engine, parts.adapters, parts.service.meters, is_open=lambda: True, num_slots=4
    )
    return AttachedFronts(core, FACTS, load)


class AttachingFleet:
    """A fleet, and what attaches to replicas for it."""

    def __init__(self) -> None:
        clock = asyncio.get_running_loop().time
        self.fleet = Fleet(AffineRouter(random.Random(1).randrange), clock=clock)
        self.service = ReplicatedService(self.fleet, clock)
        self._tasks: list[asyncio.Task[None]] = []

    def attach(
        self, name: str, uri: str, tls: ssl.SSLContext | None = None, host: str = ""
    ) -> AttachedReplica:
        clock = asyncio.get_running_loop().time
        replica = AttachedReplica(
            name, uri, self.fleet, ParserBook(), tls=tls, host=host, settings=QUICK, clock=clock
        )
        self._tasks.append(asyncio.create_task(replica.run()))
        return replica

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self, adapter: str | None = None, num: int = 5, **params: Any) -> list[int]:
        result = await self.service.generate(request(adapter, num, **params))
        return [*result.sequences[0].tokens.ids]


@contextlib.asynccontextmanager
async def ingress() -> AsyncIterator[AttachingFleet]:
    made = AttachingFleet()
    try:
        yield made
    finally:
        await made.close()


@contextlib.asynccontextmanager
async def served(
    uri: str, tls: ssl.SSLContext | None = None, *, by_admin: bool = False, **config: Any
) -> AsyncIterator[AdapterWorld]:
    """A world that ingresses can attach to."""
    shard = FakeShard(
        FakeModel(vocab_size=900, eos_token_ids=frozenset()), num_blocks=400, step_delay_s=0.002
    )
    async with adapter_world(shard, **config) as world:
        fronts = fronts_of(world, by_admin=by_admin)
        await fronts.listen(uri, tls)
        try:
            yield world
        finally:
            await fronts.close()


def request(adapter: str | None = None, num: int = 5, **params: Any) -> GenerateRequest:
    values = {"adapter_source": "local", **params}
    parameters = GenerateParameters(
        max_new_tokens=num, ignore_eos_token=True, adapter_id=adapter, **values
    )
    return GenerateRequest(prompt=TextPrompt("w1 w2"), parameters=parameters)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)
