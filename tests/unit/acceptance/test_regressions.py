"""The list of faults names tests that exist: one that was moved would guard nothing."""

from __future__ import annotations

import pytest
from tests.acceptance.named_tests import is_there
from tests.acceptance.regressions import REGRESSIONS


@pytest.mark.parametrize("name", sorted({name for names in REGRESSIONS.values() for name in names}))
def test_the_test_is_there(name: str) -> None:
    assert is_there(name)
