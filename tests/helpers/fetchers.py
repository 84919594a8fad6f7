"""Fetchers against the stand-in for the hub, with verification that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_folders import CONFIG, adapter_files
from tests.helpers.adapter_verifiers import begun_file
from tests.helpers.hub_stub import StubHub, running_hub

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError
from lorax_shard.fetching.client import AdapterFetcher, FetchSettings
from lorax_shard.fetching.job import VerifySettings
from lorax_shard.fetching.limits import ProcessLimits
from lorax_shard.fetching.process import Setup
from lorax_shard.fetching.sources.interface import FetchLimits, SourceSettings

ROOT = Path(__file__).parents[2]
POET = AdapterRef.of("hub", "org/poet")


def add(hub: StubHub, name: str, test: str, seed: int = 0) -> AdapterRef:
    """Give the hub an adapter whose verification does something."""
    files = adapter_files(seed)
    files[CONFIG] = json.dumps({"r": 8, "test": test, "seed": seed}).encode()
    hub.repositories[f"org/{name}"] = files
    return AdapterRef.of("hub", f"org/{name}")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def importable_verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SOME_API_KEY"):
        monkeypatch.setenv(name, f"hf_of_the_environment_{name}")


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with running_hub(StubHub({"org/poet": adapter_files()})) as running:
        yield running


@contextlib.asynccontextmanager
async def fetcher(
    hub: StubHub, folder: Path, clock: Clock | None = None, **changes: Any
) -> AsyncIterator[AdapterFetcher]:
    """A fetcher whose store is in ``folder``; ``changes`` go to whichever settings have them."""
    parts: dict[str, Any] = {
        "sources": SourceSettings(hub_endpoint=hub.url),
        "limits": FetchLimits(attempts=1, backoff_s=0.01),
        "process": ProcessLimits(),
        "verify": VerifySettings(
            function="tests.helpers.adapter_verifiers:verify",
            context={"gate": str(folder / "gate")},
        ),
    }
    for name, part in parts.items():
        known = {field.name for field in dataclasses.fields(part)} & changes.keys()
        parts[name] = dataclasses.replace(part, **{key: changes.pop(key) for key in known})
    folder.mkdir(exist_ok=True)
    store_bytes = changes.pop("store_bytes", 1 << 30)
    setup = Setup(store_dir=str(folder / "store"), store_max_bytes=store_bytes, **parts)
    settings = FetchSettings(setup=setup, **changes)
    made = AdapterFetcher(settings, now=clock) if clock else AdapterFetcher(settings)
    try:
        yield made
    finally:
        await made.close()


async def failure(
    made: AdapterFetcher, ref: AdapterRef, token: str | None = None, **options: bool
) -> AdapterUnavailableError:
    with pytest.raises(AdapterUnavailableError) as caught:
        await made.fetch(ref, token, **options)
    return caught.value


async def verifying(folder: Path, seed: int = 0) -> None:
    """Wait until the adapter of a seed is verified, by whichever fetcher works in ``folder``."""
    begun = begun_file(folder / "gate", seed)
    while not begun.exists():
        await asyncio.sleep(0.005)
    begun.unlink()


async def asked(hub: StubHub, times: int, name: str = "poet") -> None:
    """Wait until the hub was asked so many times what a name leads to."""
    while hub.requests.count(f"GET /api/models/org/{name}/revision/main") < times:
        await asyncio.sleep(0.005)
