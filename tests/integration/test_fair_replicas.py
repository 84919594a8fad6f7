"""Tenants over three replicas: each counts what the others gave, as the ingress tells it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world
from tests.helpers.in_loop import in_loop

from lorax_contract.config import RouterConfig
from lorax_ingress.attaching import AttachedReplica, AttachSettings
from lorax_ingress.fleet import Fleet
from lorax_ingress.routing.values import ReplicaView, RouteDecision, RouteReason, RouteRequest
from lorax_ingress.service import ReplicatedService
from lorax_router.core.policies.fair import OUTPUT_WEIGHT
from lorax_router.listening import listen_for_ingresses
from lorax_router.service.callers import Caller
from lorax_router.service.chat.parser_book import ParserBook
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt
from lorax_router.shards.fake.shard import FakeModel, FakeShard
from lorax_router.simulator.service import vtc_bound

NUM_BLOCKS, BLOCK_SIZE = 40, 4
# Where each tenant's requests go, in turns.
PLACES = {"a": "012", "b": "01"}
# Of all replicas together, until the end.
SERVICE = 9000.0


class InTurns:
    """Sends requests where their tenant's adapters are, in turns."""

    def __init__(self) -> None:
        self._turns: dict[str, Iterator[str]] = {
            tenant: itertools.cycle(names) for tenant, names in PLACES.items()
        }

    def route(self, request: RouteRequest, now: float) -> RouteDecision:
        return RouteDecision(next(self._turns[request.tenant]), RouteReason.LOAD)

    def see(self, view: ReplicaView) -> None: ...
    def take_preloads(self) -> tuple[()]:
        return ()

    def begins(self, number: str) -> None: ...
    def ended(self, number: str, now: float) -> None: ...
    def forget(self, name: str) -> None: ...
    def sent(self, number: str, request: RouteRequest, replica: str, now: float) -> None: ...


@contextlib.asynccontextmanager
async def served(uri: str) -> AsyncIterator[AdapterWorld]:
    """A router that ingresses attach to, as its process lets them."""
    shard = FakeShard(
        FakeModel(vocab_size=900, eos_token_ids=frozenset()),
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, step_delay_s=0.01,
    )  # fmt: skip
    async with adapter_world(shard, max_total_tokens=40, max_concurrent_requests=1000) as world:
        config = RouterConfig(
            model_id="fake", tokenizer_dir="", shard_uri="", max_total_tokens=40, ingress_uri=uri
        )
        ingresses = await listen_for_ingresses(config, world.parts)
        assert ingresses is not None
        try:
            yield world
        finally:
            await ingresses.close()


@contextlib.asynccontextmanager
async def ingress(uris: dict[str, str], *, tells: bool) -> AsyncIterator[ReplicatedService]:
    fleet = Fleet(InTurns())  # type: ignore[arg-type]
    if not tells:
        fleet.given_elsewhere = lambda name: ({}, {})  # type: ignore[method-assign]
    settings = AttachSettings(gossip_s=0.01, first_pause_s=0.02)
    running = [
        asyncio.create_task(
            AttachedReplica(name, uri, fleet, ParserBook(), settings=settings).run()
        )
        for name, uri in uris.items()
    ]
    try:
        async with asyncio.timeout(20):
            while len(fleet._views) < len(uris):
                await asyncio.sleep(0.01)
        yield ReplicatedService(fleet)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def request(tenant: str) -> GenerateRequest:
    parameters = GenerateParameters(max_new_tokens=16, ignore_eos_token=True)
    return GenerateRequest(
        prompt=TextPrompt("w1 w2"), parameters=parameters, caller=Caller(tenant=tenant)
    )


def given(worlds: list[AdapterWorld]) -> dict[str, float]:
    """What each tenant got of all replicas."""
    each = [world.parts.engine.service_here() for world in worlds]
    return {tenant: sum(one.get(tenant, 0.0) for one in each) for tenant in PLACES}


def is_backlogged(world: AdapterWorld, name: str) -> bool:
    depths = world.parts.engine.stats().queue_depths
    return all(tenant in depths for tenant, names in PLACES.items() if name in names)


async def service_gap(folder: Path, *, tells: bool, num_ingresses: int = 1) -> float:
    """Return the largest gap of service between the tenants, over any part of the time."""
    uris = {name: f"unix:{folder}/{name}" for name in "012"}
    async with contextlib.AsyncExitStack() as stack:
        worlds = [await stack.enter_async_context(served(uri)) for uri in uris.values()]
        services = [
            await stack.enter_async_context(ingress(uris, tells=tells))
            for _ in range(num_ingresses)
        ]
        asked: list[asyncio.Task[Any]] = [
            asyncio.create_task(service.generate(request(tenant)))
            for service, _ in zip(itertools.cycle(services), range(200))
            for tenant, names in PLACES.items()
            for _ in names
        ]
        gaps = []
        try:
            async with asyncio.timeout(60):
                while sum((now := given(worlds)).values()) < SERVICE:
                    if all(map(is_backlogged, worlds, uris)):
                        gaps.append(now["a"] - now["b"])
                    await asyncio.sleep(0.005)
            assert all(map(is_backlogged, worlds, uris))
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return max(gaps) - min(gaps)


# Of one server: its longest prompt, and all tokens that it holds at once.
BOUND = vtc_bound(4, NUM_BLOCKS * BLOCK_SIZE)


@pytest.mark.parametrize("num_ingresses", [1, 2])
@in_loop
async def test_two_tenants_stay_within_twice_the_bound_of_one(
    num_ingresses: int, tmp_path: Path
) -> None:
    assert BOUND == 2 * OUTPUT_WEIGHT * NUM_BLOCKS * BLOCK_SIZE
    gap = await service_gap(tmp_path, tells=True, num_ingresses=num_ingresses)
    print(f"gap {gap:,.0f}, bound {BOUND:,.0f}")
    assert gap <= 2 * BOUND


@in_loop
async def test_without_telling_each_other_they_do_not(tmp_path: Path) -> None:
    gap = await service_gap(tmp_path, tells=False)
    print(f"gap {gap:,.0f}, bound {BOUND:,.0f}")
    assert gap > 2 * BOUND
