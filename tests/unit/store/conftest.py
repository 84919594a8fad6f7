"""A store in a scratch folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorax_shard.store.store import AdapterStore


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store", max_bytes=1 << 30)
