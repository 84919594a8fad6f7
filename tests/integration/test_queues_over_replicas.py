"""What a tenant may have waiting holds over all replicas: each is told what waits at the others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from tests.helpers.adapter_world import AdapterWorld
from tests.helpers.attached_replicas import ingress, request, served, until
from tests.helpers.in_loop import in_loop

from lorax_contract.errors import LoraxError, QueueFullError
from lorax_router.service.callers import Caller, Quotas
from lorax_router.service.requests import GenerateRequest

ACME = Caller(tenant="acme", quotas=Quotas(queued_requests=4))
FLOOD = Caller(tenant="acme")
OTHER = Caller(tenant="other", quotas=Quotas(queued_requests=4))


def asked(caller: Caller, num: int = 150) -> GenerateRequest:
    return replace(request(None, num), caller=caller)


def num_queued(world: AdapterWorld) -> int:
    depth = world.parts.engine.stats().queue_depths.get("acme")
    return 0 if depth is None else depth.num_requests


@in_loop
@pytest.mark.parametrize("num_ingresses", [1, 2])
async def test_what_waits_at_one_replica_counts_at_the_others(
    tmp_path: Path, num_ingresses: int
) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with (
        served(uris["a"]) as one, served(uris["b"]) as two,
        ingress() as first, ingress() as second,
    ):  # fmt: skip
        for made in (first, second)[:num_ingresses]:
            for name, uri in uris.items():
                made.attach(name, uri)
            await until(lambda made=made: len(made.fleet._views) == 2)
        # As many begin as there are blocks of KV.
        flood = [asyncio.create_task(one.parts.service.generate(asked(FLOOD))) for _ in range(420)]
        await until(lambda: num_queued(one) >= 4)
        backlog = two.parts.engine._scheduler.backlog
        await until(lambda: backlog._elsewhere.get("acme", (0, 0))[0] >= 4)
        with pytest.raises(QueueFullError, match="requests of yours wait already"):
            await two.parts.service.generate(asked(ACME, 1))
        # Others have their own.
        await two.parts.service.generate(asked(OTHER, 1))
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        await until(lambda: "acme" not in backlog._elsewhere)
        await two.parts.service.generate(asked(ACME, 1))


@in_loop
async def test_what_an_ingress_said_that_is_gone_counts_no_more(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/a"
    async with served(uri) as world:
        async with ingress() as made:
            made.attach("a", uri)
            await until(lambda: made.fleet.is_open)
            made.fleet.queued_elsewhere = lambda name: {"acme": (9, 9)}  # type: ignore[method-assign]
            backlog = world.parts.engine._scheduler.backlog
            await until(lambda: "acme" in backlog._elsewhere)
            with pytest.raises(LoraxError):
                await world.parts.service.generate(asked(ACME, 1))
        await until(lambda: backlog._elsewhere == {})
        await world.parts.service.generate(asked(ACME, 1))
