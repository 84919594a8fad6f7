"""The store's benchmark measures both stores, by turns."""

from __future__ import annotations

import pytest
from bench import store


def test_every_figure_is_there_for_few_and_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "NUM_FETCHES", 2)
    monkeypatch.setattr(store, "NUM_PAGES", 2)
    found = store.figures(few=5, many=60)
    assert set(found) == {
        "start_ms", "cold_fetch_ms", "cold_fetch_cpu_ms", "known_fetch_ms", "known_fetch_cpu_ms",
        "page_ms",
    }  # fmt: skip
    assert all(less >= 0.0 and more >= 0.0 for less, more in found.values())
