"""The points of the list: other people's clients against this server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.acceptance import generated_client, openapi, published_clients, tenants
from tests.acceptance.clients.runs import PROGRAMS, run_client
from tests.acceptance.harness import Point, Result
from tests.acceptance.suites import ROOT
from tests.helpers.server import Server

ADAPTERS = ROOT / "examples/adapters"
OPTIONS = (
    "--served-model-name", "base", "--adapter-local-root", str(ADAPTERS),
    "--lora-modules", f"pirate={ADAPTERS / 'pirate'}",
)  # fmt: skip


def _client(name: str) -> Callable[[], Result]:
    def measure() -> Result:
        with Server(*OPTIONS, *PROGRAMS[name].options) as server:
            return asyncio.run(run_client(name, server.url, "base", "pirate"))

    return measure


POINTS = [
    *(Point(f"1 {name}", f"{name}, unmodified", _client(name)) for name in PROGRAMS),
    *published_clients.POINTS,
    *generated_client.POINTS,
    *openapi.POINTS,
    *tenants.POINTS,
]
