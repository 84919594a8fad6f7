"""Replicas over sockets: attached, lost, attached again; and who may attach."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from tests.helpers.attached_replicas import QUICK, ingress, request, served, until
from tests.helpers.certificates import Authority
from tests.helpers.in_loop import in_loop
from tests.helpers.replicas import FACTS
from tests.helpers.server import free_ports

from lorax_ingress.finding import Located, ReplicaPlaces
from lorax_proto.mutual_tls import context_of_client, context_of_server
from lorax_router.fronts import attached


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
        await until(lambda: "local:poet" in made.fleet._views["r"].resident)
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


@in_loop
async def test_a_certificate_bears_the_name_that_addresses_were_found_by(tmp_path: Path) -> None:
    """As pods have one certificate, and addresses that nobody knows before."""
    authority = Authority("ours")
    of_core = authority.write(tmp_path / "core", "core", "lorax-links")
    tls = context_of_client(authority.write(tmp_path / "ingress", "ingress"))
    port = free_ports(1)[0]
    uri = f"127.0.0.1:{port}"
    async with served(uri, context_of_server(of_core)), ingress() as made:
        named = made.attach("named", uri, tls, "lorax-links")
        others = [made.attach("address", uri, tls), made.attach("other", uri, tls, "others")]
        assert len(await made.ask()) == 5
        assert named.facts
        await asyncio.sleep(0.3)
        assert [each.facts for each in others] == [None, None]


@in_loop
async def test_addresses_of_a_name_bear_it() -> None:
    places = ReplicaPlaces(["dns:localhost:3100", "b=10.0.0.1:3100"])
    async for found in places.follow():
        assert {each.host for each in found if each.uri.startswith("127.")} == {"localhost"}
        assert Located("b", "10.0.0.1:3100", "") in found
        break
