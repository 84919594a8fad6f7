"""The store's benchmark measures both stores, by turns."""

from __future__ import annotations

import subprocess
import sys

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


def test_processes_of_others_are_not_counted_when_they_end() -> None:
    spin = (
        "import time; began = time.process_time()\nwhile time.process_time() - began < 0.1: pass\n"
    )
    other = subprocess.Popen([sys.executable, "-c", f"{spin}input()"], stdin=subprocess.PIPE)
    besides = frozenset(store.descendants())
    assert other.pid in besides
    before = store.cpu_s(besides)
    other.communicate(b"\n")
    assert store.cpu_s(besides) == before

    counted = subprocess.Popen(
        [sys.executable, "-c", f"{spin}print()\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert counted.stdout is not None
    counted.stdout.readline()
    assert store.cpu_s(besides) > before
    counted.communicate(b"\n")
