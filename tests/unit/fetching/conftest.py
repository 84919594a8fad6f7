"""A store in a scratch folder, and a context whose pauses take no time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lorax_shard.fetching.sources.interface import FetchContext, FetchLimits
from lorax_shard.store.store import AdapterStore


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store", max_bytes=1 << 30)


@pytest.fixture
def context() -> FetchContext:
    return make_context()


def make_context(seconds: float = 30.0, **limits: float) -> FetchContext:
    chosen = FetchLimits(**{"stall_timeout_s": 5.0, "attempts": 3, **limits})  # type: ignore[arg-type]
    deadline = time.monotonic() + seconds
    return FetchContext(limits=chosen, deadline=deadline, pause=lambda _seconds: None)
