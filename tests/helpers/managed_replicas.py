"""Replicas that are managed through ingresses, and what is known there."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
from tests.helpers.adapter_world import AdapterWorld, ref
from tests.helpers.attached_replicas import AttachingFleet
from tests.helpers.attached_replicas import served as served_by

from lorax_ingress.calls import IngressCalls
from lorax_router.service.adapters.registry import Remembered


def served(uri: str) -> AbstractAsyncContextManager[AdapterWorld]:
    return served_by(uri, by_admin=True)


def client_of(made: AttachingFleet) -> httpx.AsyncClient:
    calls = IngressCalls(made.fleet, {}, 1 << 20)
    transport = httpx.ASGITransport(app=calls)
    return httpx.AsyncClient(transport=transport, base_url="http://ingress")


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text


def known(world: AdapterWorld) -> Remembered:
    return world.parts.adapters.registry.read()


def is_loaded(world: AdapterWorld, name: str) -> bool:
    found = world.catalog.names.find(ref(name))
    return found is not None and found.content_key is not None


def pinned(world: AdapterWorld) -> set[str]:
    return {each.ref.id for each in known(world).pins}
