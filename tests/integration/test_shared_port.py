"""Several ingresses as processes at one port: one that dies breaks its own connections and no others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
from tests.helpers.ingress_process import (
    LONG,
    IngressProcess,
    in_time,
    ingress,
    router,
    sample,
    streamed,
)

SHORT = {**LONG, "parameters": {**LONG["parameters"], "max_new_tokens": 3}}  # type: ignore[dict-item]


async def asked(url: str, num: int) -> None:
    """Ask, each time on a connection of its own; all are answered."""
    for _ in range(num):
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            assert (await client.post("/generate", json=SHORT)).status_code == 200


async def routed_by(made: IngressProcess) -> float:
    """Requests that one ingress had, by its own metrics."""
    async with httpx.AsyncClient(base_url=made.metrics.removesuffix("/metrics")) as client:
        return await sample(client, "lorax_ingress_routed_total")


async def own_stream(url: str, begun: asyncio.Event) -> list[int]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return await streamed(client, begun)


@in_time
async def test_one_that_dies_breaks_its_own_connections_and_comes_back(folder: Path) -> None:
    shared = {"share_port": "", "metrics_port": "0"}
    async with (
        router(folder, "a"), router(folder, "b"), ingress(folder, "a", "b", **shared) as one,
    ):  # fmt: skip
        url = await one.url()
        shared["port"] = url.rpartition(":")[2]
        async with ingress(folder, "a", "b", **shared) as other:
            assert await other.url() == url
            await asked(url, 40)
            counts = [await routed_by(each) for each in (one, other)]
            assert min(counts) > 0
            assert sum(counts) == 40
            begun = [asyncio.Event() for _ in range(24)]
            reading = [asyncio.create_task(own_stream(url, each)) for each in begun]
            await asyncio.gather(*(each.wait() for each in begun))
            num_own = await routed_by(other) - counts[1]
            other.process.kill()
            answers = await asyncio.gather(*reading, return_exceptions=True)
            broken = [each for each in answers if isinstance(each, BaseException)]
            assert all(isinstance(each, httpx.TransportError) for each in broken)
            assert len(broken) == num_own
            assert {len(each) for each in answers if isinstance(each, list)} <= {300}
            await other.process.wait()
            await asked(url, 20)
        async with ingress(folder, "a", "b", **shared) as successor:
            assert await successor.url() == url
            await asked(url, 40)
            assert await routed_by(successor) > 0


@in_time
async def test_a_port_that_is_not_shared_is_taken(folder: Path) -> None:
    """Whoever forgets to say so hears of it."""
    async with router(folder, "a"), ingress(folder, "a") as one:
        port = (await one.url()).rpartition(":")[2]
        async with ingress(folder, "a", port=port, share_port="") as other:
            await other.process.wait()
            await other._reading
            assert any(f"cannot listen on 127.0.0.1:{port}" in str(each) for each in other.log)
