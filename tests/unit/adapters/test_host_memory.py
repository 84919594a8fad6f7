"""What is asked of the C library's allocator, and when nothing is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lorax_shard.adapters import host_memory


def test_one_arena_is_asked_for_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []
    library = SimpleNamespace(mallopt=lambda *values: calls.append(values))
    monkeypatch.setattr(host_memory, "_c_library", lambda: library)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    host_memory.use_one_arena()
    assert calls == []
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    host_memory.use_one_arena()
    assert calls == [(-8, 1)]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Library:
        def __getattr__(self, name: str) -> object:
            asked.append(name)
            raise AttributeError(name)

    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setattr(host_memory, "_c_library", Library)
    host_memory.use_one_arena()
    host_memory.give_back()
    assert asked == ["mallopt", "malloc_trim"]
