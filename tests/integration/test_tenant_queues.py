"""Queues of tenants through the whole router, over shards that stand in for real ones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop
from tests.helpers.tenants import bearer, key_of, tenant_world

from lorax_router.core.backlog import QueueDepth


def depths(world: Any) -> dict[str, QueueDepth]:
    return dict(world.parts.engine.stats().queue_depths)


async def ask(world: Any, tenant: str, **headers: str) -> httpx.Response:
    body = {"inputs": "w1 w2", "parameters": {"max_new_tokens": 4}}
    return await world.client.post(
        "/generate", json=body, headers={**bearer(key_of(tenant)), **headers}
    )


@in_loop
async def test_a_full_queue_is_its_tenants_own_affair(tmp_path: Path) -> None:
    tenants = {"ant": {"queued_requests": 3}, "bee": {}}
    async with tenant_world(tmp_path, tenants, max_batch_size=1) as (world, callers):
        # One row, which waits for its step.
        world.shard.step_delay_s = lambda plan: 0.0 if go.is_set() else 0.05
        go = asyncio.Event()
        running = [asyncio.ensure_future(callers["ant"].use(None, max_new_tokens=100))]
        await until(lambda: world.parts.engine.stats().num_running == 1)
        running += [asyncio.ensure_future(callers["ant"].use(None)) for _ in range(3)]
        await until(lambda: depths(world).get("ant", QueueDepth(0, 0)).num_requests == 3)
        refused = await ask(world, "ant")
        assert refused.status_code == 429
        assert refused.json()["error"].startswith("Quota exceeded: 3 requests of yours wait")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        other = asyncio.ensure_future(ask(world, "bee"))
        await until(lambda: "bee" in depths(world) or other.done())
        scraped = (await callers["metrics"].get("/metrics")).text
        assert 'lorax_tenant_queue_requests{tenant="ant"} 3.0' in scraped
        assert 'lorax_request_rejected{reason="queue_full",tenant="ant"} 1.0' in scraped
        go.set()
        assert (await other).status_code == 200
        assert [each.status_code for each in await asyncio.gather(*running)] == [200] * 4


@in_loop
async def test_the_probe_of_the_health_goes_past_a_full_queue(tmp_path: Path) -> None:
    tenants = {"ant": {"queued_requests": 2}}
    config = {"max_batch_size": 2, "max_queued_requests": 2}
    async with tenant_world(tmp_path, tenants, **config) as (world, callers):
        world.shard.step_delay_s = 0.02
        running = [asyncio.ensure_future(callers["ant"].use(None, max_new_tokens=50)) for _ in "12"]
        await until(lambda: world.parts.engine.stats().num_running == 2)
        running += [asyncio.ensure_future(callers["ant"].use(None)) for _ in "34"]
        await until(lambda: depths(world).get("ant", QueueDepth(0, 0)).num_requests == 2)
        await world.parts.service.probe()
        assert {each.status_code for each in await asyncio.gather(*running)} == {200}


@in_loop
async def test_a_deadline_that_has_passed_frees_the_row(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {}}, max_batch_size=1) as (world, callers):
        world.shard.step_delay_s = 0.01
        late = await ask(world, "ant", **{"x-request-timeout": "0.000001"})
        assert late.status_code == 504
        assert (await ask(world, "ant")).status_code == 200
        assert world.parts.engine.stats().num_running == 0
        scraped = (await callers["metrics"].get("/metrics")).text
        assert 'lorax_request_rejected{reason="deadline",tenant="ant"} 1.0' in scraped


@in_loop
async def test_a_flood_of_cold_adapters_leaves_others_where_they_are(tmp_path: Path) -> None:
    tenants = {"ant": {"adapter_share": 0.5}, "bee": {}}
    config = {"max_active_adapters": 6, "default_adapter_source": "hub"}
    async with tenant_world(tmp_path, tenants, **config) as (world, callers):
        for name in ("b1", "b2"):
            assert (await callers["bee"].use(name)).status_code == 200
        for number in range(20):
            assert (await callers["ant"].use(f"a{number}")).status_code == 200
        page = (await callers["admin"].get("/v1/adapters?limit=500")).json()["adapters"]
        resident = {each["adapter_id"] for each in page if each["bytes"]["device"]}
        assert {"b1", "b2"} < resident and len(resident) > 3
