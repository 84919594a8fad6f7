"""The list of faults names tests that exist: one that was moved would guard nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.acceptance.regressions import REGRESSIONS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", sorted({name for names in REGRESSIONS.values() for name in names}))
def test_the_test_is_there(name: str) -> None:
    path, _, function = name.partition("::")
    text = (ROOT / path).read_text()
    assert f"def {function.rpartition('::')[2].partition('[')[0]}(" in text or not function
