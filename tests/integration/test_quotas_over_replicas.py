"""Quotas of tenants hold over all replicas: each counts what the others gave."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from tests.helpers.adapter_world import AdapterWorld
from tests.helpers.attached_replicas import ingress, request, served, until
from tests.helpers.in_loop import in_loop

from lorax_contract.errors import QuotaError
from lorax_router.service.callers import Caller, Quotas
from lorax_router.service.requests import GenerateRequest

# A request comes back in 15 s, and a token in a second.
REQUESTS = Caller(tenant="acme", quotas=Quotas(requests_per_minute=4))
TOKENS = Caller(tenant="acme", quotas=Quotas(tokens_per_minute=60))


def asked(caller: Caller, num: int = 5) -> GenerateRequest:
    return replace(request(None, num), caller=caller)


async def refused(world: AdapterWorld, caller: Caller) -> str:
    with pytest.raises(QuotaError) as caught:
        await world.parts.service.generate(asked(caller, 1))
    return caught.value.public


@in_loop
async def test_what_all_gave_together_is_the_quota(tmp_path: Path) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with served(uris["a"]) as one, served(uris["b"]) as two, ingress() as made:
        for name, uri in uris.items():
            made.attach(name, uri)
        await until(lambda: len(made.fleet._views) == 2)
        # Four at once go to both.
        await asyncio.gather(*(made.service.generate(asked(REQUESTS)) for _ in range(4)))
        counts = [world.parts.service.meters.taken()["requests:acme"] for world in (one, two)]
        assert sorted(counts) != [0.0, 4.0]
        assert sum(counts) == 4.0
        meters = [world.parts.service.meters.of(REQUESTS) for world in (one, two)]
        await until(lambda: all(each._buckets["requests"].wait_s() > 0 for each in meters))
        with pytest.raises(QuotaError, match="quota of 4 requests a minute"):
            await made.service.generate(asked(REQUESTS))
        for world in (one, two):
            assert "4 requests a minute" in await refused(world, REQUESTS)
            # What others gave is not said to have been given here.
            assert world.parts.service.meters.taken()["requests:acme"] in counts


@in_loop
async def test_a_tenant_that_comes_to_a_replica_later_brings_what_it_took(tmp_path: Path) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with served(uris["a"]) as one, served(uris["b"]) as two, ingress() as made:
        for name, uri in uris.items():
            made.attach(name, uri)
        await until(lambda: len(made.fleet._views) == 2)
        await one.parts.service.generate(asked(TOKENS, 150))
        meters = two.parts.service.meters
        await until(lambda: sum(n for _, n in meters._before["acme"]["tokens"]) >= 150)
        assert "60 tokens a minute" in await refused(two, TOKENS)
        assert meters._before == {}
