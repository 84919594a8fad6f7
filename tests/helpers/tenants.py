"""Tenants with keys of their own: their file, and short ways to call as one of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from tests.helpers.adapter_world import AdapterWorld, adapter_world

from lorax_contract.keys import hash_of

ADMIN_KEY = "sk-of-the-operator"
METRICS_KEY = "sk-of-the-scraper"
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def key_of(tenant: str) -> str:
    return f"sk-of-tenant-{tenant}"


def keys_file(path: Path, **tenants: dict[str, Any]) -> Path:
    """Write a file in which each tenant has its key and what is said of it here."""
    document = {name: {"keys": [key_of(name)], **values} for name, values in tenants.items()}
    path.write_text(json.dumps({"tenants": document}))
    return path


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Tenant:
    """One tenant's client."""

    def __init__(self, world: AdapterWorld, key: str) -> None:
        self._world = world
        self._key = key

    async def get(self, path: str) -> httpx.Response:
        return await self._world.client.get(path, headers=bearer(self._key))

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self._world.client.post(path, json=body, headers=bearer(self._key))

    async def use(self, adapter: str | None, source: str = "hub", **params: Any) -> httpx.Response:
        values = {"adapter_source": source, "max_new_tokens": 3, "ignore_eos_token": True, **params}
        if adapter is not None:
            values["adapter_id"] = adapter
        return await self.post("/generate", inputs="w1 w2", parameters=values)

    async def manage(self, verb: str, adapter: str, source: str = "hub", **more: Any) -> Any:
        body = {"adapter_id": adapter, "adapter_source": source, **more}
        return await self.post(f"/v1/adapters/{verb}", **body)

    async def listed(self) -> set[str]:
        answer = await self.get("/v1/adapters?limit=500")
        assert answer.status_code == 200
        return {each["adapter_id"] for each in answer.json()["adapters"]}

    async def models(self) -> set[str]:
        answer = await self.get("/v1/models")
        assert answer.status_code == 200
        return {each["id"] for each in answer.json()["data"]}


@contextlib.asynccontextmanager
async def tenant_world(
    path: Path, tenants: dict[str, dict[str, Any]], **config: Any
) -> AsyncIterator[tuple[AdapterWorld, dict[str, Tenant]]]:
    """A router with keys; ``admin`` and ``metrics`` are there beside the tenants."""
    values = {
        "api_keys_file": str(keys_file(path / "keys.json", **tenants)),
        "admin_key_hashes": [hash_of(ADMIN_KEY)],
        "metrics_key_hashes": [hash_of(METRICS_KEY)],
        **config,
    }
    async with adapter_world(**values) as world:
        # No quota fills up again while a test runs, however long that takes.
        world.parts.service.meters._clock = lambda: 0.0
        keys = {name: key_of(name) for name in tenants}
        keys |= {"admin": ADMIN_KEY, "metrics": METRICS_KEY}
        yield world, {name: Tenant(world, key) for name, key in keys.items()}
