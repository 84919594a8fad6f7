"""A few cases of each target of the fuzzer; ``make fuzz`` plays thousands."""

from __future__ import annotations

import pytest
from tests.fuzz.targets import NAMES, target_of
from tests.fuzz.targets.hunt import hunt

# What some seconds are enough for.
_NUM_CASES = {"http": 150, "grpc": 120, "shard": 120, "adapters": 100, "templates": 80,
              "grammars": 80, "gguf": 20, "tokenizers": 80}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_sent_gets_through(name: str) -> None:
    hunted = hunt(target_of(name), 11, numbers=range(_NUM_CASES[name]))
    assert hunted.finding == ""
    # Some are taken and some refused: the cases are neither all too wild nor all too tame.
    assert hunted.outcomes["refused"] > 1, str(hunted)
    assert hunted.outcomes["taken"] > 1, str(hunted)
