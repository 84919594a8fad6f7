"""Odd requests to a router over a fake shard: what is refused, and in which words."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from tests.helpers.adapter_world import AdapterWorld, adapter_world
from tests.helpers.dialects import DIALECTS, Dialect, Fault, events_of, fault_of
from tests.helpers.http_app import TEMPLATE

JSON = {"content-type": "application/json"}
# Where adapters are managed: those routes are the operator's.
_ADMIN = ("/v1/adapters/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Asking:
    """One world whose routes are asked odd things; no answer may be a 5xx."""

    def __init__(self, world: AdapterWorld) -> None:
        self.world = world

    async def post(self, path: str, body: Any) -> Fault | None:
        """Send a body; return what is refused, None for what is answered."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        client = self.world.admin if path.startswith(_ADMIN) else self.world.client
        answer = await client.post(path, content=raw, headers=JSON)
        assert answer.status_code < 500, (path, raw[:200], answer.text[:300])
        if answer.status_code != 200:
            return fault_of(path, answer)
        if answer.headers["content-type"] == "text/event-stream":
            broken = [each for each in events_of(answer) if each.get("error")]
            assert not broken, (path, raw[:200], broken)
        return None

    async def refused(self, dialect: Dialect, fields: dict[str, Any]) -> Fault:
        """Ask whole and streamed; return what both say, and say alike."""
        whole, streamed = [
            await self.post(*dialect.asked(fields, stream=stream)) for stream in (False, True)
        ]
        assert whole is not None, f"{dialect.name}: {str(fields)[:300]} is taken"
        assert whole == streamed
        return whole


@contextlib.asynccontextmanager
async def asking(template: str = TEMPLATE) -> AsyncIterator[Asking]:
    """A world that serves every dialect, before and after whatever it is asked."""
    async with adapter_world(template=template, default_adapter_source="local") as world:
        yield Asking(world)
        for dialect in DIALECTS:
            answer = await world.client.post(dialect.path, json=dialect.body)
            assert answer.status_code == 200, answer.text


async def fields_of_all(world: AdapterWorld) -> dict[str, tuple[str, ...]]:
    """The fields of all routes that read a body, as the server documents them."""
    found = {}
    for client in (world.client, world.admin):
        document = (await client.get("/api-doc/openapi.json")).json()
        for path, verbs in document["paths"].items():
            if told := verbs.get("post", {}).get("requestBody"):
                name = told["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                found[path] = tuple(document["components"]["schemas"][name]["properties"])
    return found


def play(scene: Callable[[Asking], Awaitable[None]]) -> None:
    """Run a scene in a world of its own."""

    async def run() -> None:
        async with asking() as ask:
            await scene(ask)

    asyncio.run(asyncio.wait_for(run(), 240))
