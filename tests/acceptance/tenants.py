"""Whether the time of an answer tells a tenant which of others' adapters exist.

``python -m tests.acceptance.tenants`` prints the table.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
from tests.acceptance.harness import Point, Result, run_points
from tests.helpers.adapter_world import AdapterWorld, fetched
from tests.helpers.http_app import serving
from tests.helpers.tenants import NAMES, bearer, key_of, tenant_world

from lorax_contract.adapters import AdapterQuery, AdapterUnavailableError, FetchedAdapter, Reason

PAIRS = 200
MOST_APART = 0.10
# Of a source that has to be asked, as over a network.
_SOURCE_S = 0.002
# Others' adapters, known to the server and resident.
_NUM_KNOWN = 60


class SlowHub:
    """A hub on which some adapters open to some tokens; both its answers take as long."""

    def __init__(self, world: AdapterWorld) -> None:
        world.shard.on_fetch = self.fetch

    def fetch(self, query: AdapterQuery) -> Any:
        return asyncio.ensure_future(self._answer(query))

    async def _answer(self, query: AdapterQuery) -> FetchedAdapter:
        await asyncio.sleep(_SOURCE_S)
        owner, _, name = query.ref.id.partition("/")
        if not name.startswith("secret") or query.token != f"hf_{owner}":
            raise AdapterUnavailableError(Reason.NOT_FOUND, "it is not there for you")
        return fetched(query.ref.id, access="token")


async def _medians(ask: Callable[[str], Awaitable[object]], pairs: list[tuple[str, str]]) -> Result:
    """Ask for pairs of an adapter that exists and one that does not, in an order of chance."""
    seconds: tuple[list[float], list[float]] = ([], [])
    draw = random.Random(7)
    for pair in pairs:
        for which in draw.sample((0, 1), 2):
            started = perf_counter()
            await ask(pair[which])
            seconds[which].append(perf_counter() - started)
    there, absent = map(statistics.median, seconds)
    apart = abs(there - absent) / max(there, absent)
    figure = f"{there * 1e3:.3f} and {absent * 1e3:.3f} ms, {apart:.1%} apart"
    return Result(apart <= MOST_APART, f"{len(pairs)} pairs: {figure}")


async def _measure(kind: str) -> Result:
    tenants: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    tenants["ant"] = {"pins": 1}
    tenants["bee"] = {"adapters": ["bee-*"], "pins": 1}
    with tempfile.TemporaryDirectory() as folder:
        async with (
            tenant_world(Path(folder), tenants, default_adapter_source="hub") as (world, callers),
            serving(world.parts.app) as (url, _),
            httpx.AsyncClient(base_url=url, timeout=30) as client,
        ):
            SlowHub(world)
            for number in range(_NUM_KNOWN):
                await callers["cat"].use(f"cat/secret{number}", api_token="hf_cat")
            # The same length, and each asked for as often.
            numbers = [number % _NUM_KNOWN for number in range(PAIRS)]
            pairs = [(f"cat/secret{each}", f"cat/absent{each}") for each in numbers]
            return await _medians(_asking(kind, client), pairs)


def _asking(kind: str, client: httpx.AsyncClient) -> Callable[[str], Awaitable[object]]:
    """How one tenant asks for an adapter that is another's, and is refused."""
    tenant = "bee" if kind.startswith("bounded") else "ant"
    headers = bearer(key_of(tenant))

    async def use(name: str) -> object:
        parameters = {"adapter_id": name, "adapter_source": "hub", "api_token": f"hf_{tenant}"}
        answer = await client.post(
            "/generate", json={"inputs": "w1", "parameters": parameters}, headers=headers
        )
        assert answer.status_code == 422, answer.text
        return answer

    async def look(name: str) -> object:
        answer = await client.get(f"/v1/models/{name}", headers=headers)
        assert answer.status_code == 404, answer.text
        return answer

    async def pin(name: str) -> object:
        body = {"adapter_id": name, "adapter_source": "hub"}
        answer = await client.post("/v1/adapters/pin", json=body, headers=headers)
        assert answer.status_code == 404, answer.text
        return answer

    return {"use": use, "look": look, "pin": pin}[kind.rpartition(" ")[2]]


def _point(number: str, kind: str, title: str) -> Point:
    return Point(number, title, lambda: asyncio.run(_measure(kind)))


POINTS = [
    _point("7a", "use", "another's private adapter, used: as long as for none"),
    _point("7b", "look", "another's private adapter, looked up: as long as for none"),
    _point("7c", "pin", "another's private adapter, pinned: as long as for none"),
    _point("7d", "bounded use", "an adapter out of bounds, used: as long as for none"),
    _point("7e", "bounded look", "an adapter out of bounds, looked up: as long as for none"),
    _point("7f", "bounded pin", "an adapter out of bounds, pinned: as long as for none"),
]

if __name__ == "__main__":
    sys.exit(run_points(POINTS, set(sys.argv[1:])))
