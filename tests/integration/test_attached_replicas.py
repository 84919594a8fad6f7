"""Replicas over sockets: attached, lost, attached again; and who may attach."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world
from tests.helpers.certificates import Authority
from tests.helpers.in_loop import in_loop
from tests.helpers.replicas import FACTS
from tests.helpers.server import free_ports

from lorax_ingress.attaching import AttachedReplica, AttachSettings
from lorax_ingress.fleet import Fleet
from lorax_ingress.routing.router import AffineRouter
from lorax_ingress.service import ReplicatedService
from lorax_proto.mutual_tls import context_of_client, context_of_server
from lorax_router.fronts import attached
from lorax_router.fronts.attached import AttachedFronts
from lorax_router.fronts.core_facts import load_of
from lorax_router.fronts.desk import CoreParts
from lorax_router.service.chat.parser_book import ParserBook
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt
from lorax_router.shards.fake.shard import FakeModel, FakeShard

QUICK = AttachSettings(gossip_s=0.02, silence_s=0.5, first_pause_s=0.02, longest_pause_s=0.05)


def fronts_of(world: AdapterWorld) -> AttachedFronts:
    parts = world.parts
    core = CoreParts(
        service=parts.service, counts=parts.service.ledger, app=parts.app,
        aliases=parts.selections.aliases,
    )  # fmt: skip
    return AttachedFronts(
        core,
        FACTS,
        lambda: load_of(parts.engine, parts.adapters, is_open=True, num_slots=4),
        parts.engine.served_elsewhere,
    )


class Ingress:
    """A fleet, and what attaches to replicas for it."""

    def __init__(self) -> None:
        clock = asyncio.get_running_loop().time
        self.fleet = Fleet(AffineRouter(random.Random(1).randrange), clock=clock)
        self.service = ReplicatedService(self.fleet, clock)
        self._tasks: list[asyncio.Task[None]] = []

    def attach(self, name: str, uri: str, tls: ssl.SSLContext | None = None) -> AttachedReplica:
        clock = asyncio.get_running_loop().time
        replica = AttachedReplica(
            name, uri, self.fleet, ParserBook(), tls=tls, settings=QUICK, clock=clock
        )
        self._tasks.append(asyncio.create_task(replica.run()))
        return replica

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self, adapter: str | None = None, num: int = 5) -> list[int]:
        result = await self.service.generate(request(adapter, num))
        return [*result.sequences[0].tokens.ids]


@contextlib.asynccontextmanager
async def ingress() -> AsyncIterator[Ingress]:
    made = Ingress()
    try:
        yield made
    finally:
        await made.close()


@contextlib.asynccontextmanager
async def served(uri: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[AdapterWorld]:
    """A world that ingresses can attach to."""
    shard = FakeShard(
        FakeModel(vocab_size=900, eos_token_ids=frozenset()), num_blocks=400, step_delay_s=0.002
    )
    async with adapter_world(shard) as world:
        fronts = fronts_of(world)
        await fronts.listen(uri, tls)
        try:
            yield world
        finally:
            await fronts.close()


def request(adapter: str | None = None, num: int = 5) -> GenerateRequest:
    parameters = GenerateParameters(
        max_new_tokens=num, ignore_eos_token=True, adapter_id=adapter, adapter_source="local"
    )
    return GenerateRequest(prompt=TextPrompt("w1 w2"), parameters=parameters)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@in_loop
async def test_what_a_replica_says_of_itself_is_known(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/r"
    async with served(uri) as world, ingress() as made:
        # Who attaches is believed what it says of its callers.
        assert (tmp_path / "r").stat().st_mode & 0o077 == 0
        replica = made.attach("r", uri)
        expected = (await world.generate(None, 5)).sequences[0].tokens.ids
        assert await made.ask() == expected
        assert replica.facts == FACTS
        await made.ask("poet")
        await until(lambda: "poet" in made.fleet._views["r"].resident)
        view = made.fleet._views["r"]
        assert (view.num_slots, view.is_accepting) == (4, True)


@in_loop
async def test_a_stream_goes_on_where_another_replica_is(tmp_path: Path) -> None:
    uris = [f"unix:{tmp_path}/{number}" for number in range(2)]
    async with contextlib.AsyncExitStack() as stack, served(uris[1]) as world, ingress() as made:
        await stack.enter_async_context(served(uris[0]))
        first = made.attach("r0", uris[0])
        expected = (await world.generate(None, 150)).sequences[0].tokens.ids
        stream = await made.service.generate_stream(request(None, 150))
        found = [*(await anext(stream))[1].tokens.ids]
        second = made.attach("r1", uris[1])
        await stack.aclose()
        async for _, chunk in stream:
            found += chunk.tokens.ids
        assert found == expected
        assert (first.facts, second.facts) == (None, FACTS)


@in_loop
async def test_one_that_comes_back_is_attached_again(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/r"
    async with ingress() as made:
        replica = made.attach("r", uri)
        asking = asyncio.create_task(made.ask())
        for _ in range(3):
            async with served(uri):
                await until(lambda: replica.facts)
                await asking
            await until(lambda: not replica.facts)
            asking = asyncio.create_task(made.ask())
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


@in_loop
async def test_one_that_says_nothing_is_lost_and_the_others_serve(tmp_path: Path) -> None:
    stuck, well = f"unix:{tmp_path}/stuck", f"unix:{tmp_path}/well"
    async with served(stuck) as world, served(well), ingress() as made:
        replica = made.attach("stuck", stuck)
        await until(lambda: replica.facts)
        stream = await made.service.generate_stream(request(None, 150))
        await anext(stream)
        other = made.attach("well", well)
        # Nothing more comes over its link, as when its process stands still.
        replica._link._take = lambda data: None
        num = 1
        async for _, chunk in stream:
            num += len(chunk.tokens.ids)
        assert num == 150
        assert other.facts
        assert world.parts.engine.stats().num_running == 0


@in_loop
async def test_nobody_is_silent_while_the_ingress_itself_stands_still(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/r"
    async with served(uri), ingress() as made:
        replica = made.attach("r", uri)
        await made.ask()
        link = replica._link
        for _ in range(3):
            time.sleep(2 * QUICK.silence_s)  # noqa: ASYNC251 - the loop itself stands still
            await asyncio.sleep(2 * QUICK.gossip_s)
        await made.ask()
        assert replica._link is link


@in_loop
async def test_one_of_another_protocol_is_not_attached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "PROTOCOL", 2)
    uri = f"unix:{tmp_path}/r"
    async with served(uri), ingress() as made:
        replica = made.attach("r", uri)
        await asyncio.sleep(0.2)
        assert replica.facts is None


@pytest.mark.parametrize("who", ["ours", "plain", "stranger"])
@in_loop
async def test_over_tcp_only_who_shows_a_certificate_attaches(who: str, tmp_path: Path) -> None:
    authority = Authority("ours")
    of_core, of_ingress = (authority.write(tmp_path / name, name) for name in ("core", "ingress"))
    stranger = Authority("theirs").write(tmp_path / "x", "x")
    (stranger / "ca.pem").write_bytes((of_core / "ca.pem").read_bytes())
    shown = {"ours": context_of_client(of_ingress), "stranger": context_of_client(stranger)}
    uri = f"127.0.0.1:{free_ports(1)[0]}"
    async with served(uri, context_of_server(of_core)), ingress() as made:
        replica = made.attach("r", uri, shown.get(who))
        if who == "ours":
            assert len(await made.ask()) == 5
        else:
            await asyncio.sleep(0.3)
            assert replica.facts is None
