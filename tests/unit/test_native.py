"""Kernels are built from what their sources are now."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorax_shard import native


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(native, "default_cache_dir", lambda: tmp_path / "cache")
    path = tmp_path / "number.cpp"
    path.write_text('#include "number.h"\nextern "C" int number() { return value; }\n')
    return path


def test_a_header_that_changed_makes_another_library(source: Path) -> None:
    found = []
    for value in (3, 4, 3):
        source.with_name("number.h").write_text(f"constexpr int value = {value};\n")
        library, reason = native.load_library(source)
        if library is None and "no C++ compiler" in str(reason):
            pytest.skip(str(reason))
        assert library is not None, reason
        found.append(library.number())
    assert found == [3, 4, 3]
    assert len(list((source.parent / "cache/kernels").glob("*.so"))) == 2


def test_what_the_compiler_refuses_is_a_reason_in_words(source: Path) -> None:
    library, reason = native.load_library(source)
    assert library is None
    assert reason
