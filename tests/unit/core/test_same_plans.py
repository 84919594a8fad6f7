"""What is placed or planned ahead of an outcome changes nothing: random work, turned both ways."""

from __future__ import annotations

import os
from typing import Any

import pytest
from tests.helpers.core_policies import POLICIES
from tests.helpers.engine_turns import EngineTurns

NUM_RUNS = int(os.environ.get("LORAX_MACHINE_STEPS", "1500")) // 25
NUM_TURNS = 80


def _first_difference(one: list[Any], other: list[Any]) -> str:
    pairs = zip(one, other, strict=False)
    found = ((n, a, b) for n, (a, b) in enumerate(pairs) if a != b)
    return next((f"{n}:\n{a}\n{b}" for n, a, b in found), "" if len(one) == len(other) else "length")


@pytest.mark.parametrize("plans_behind", [False, True], ids=["prepared", "behind"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_plans_are_the_same_as_without(policy: str, depth: int, plans_behind: bool) -> None:
    num_ahead = num_behind = 0
    for seed in range(NUM_RUNS):
        ahead, plain = (
            EngineTurns(
                policy, seed, depth, prepares=is_ahead, plans_behind=is_ahead and plans_behind,
                tells_blocks=not plans_behind,
            )
            for is_ahead in (True, False)
        )  # fmt: skip
        for work in (ahead, plain):
            work.run(NUM_TURNS)
        difference = _first_difference(plain.told, ahead.told)
        assert not difference, f"seed {seed}, at {difference}"
        num_ahead += ahead.num_placed_ahead
        num_behind += ahead.num_behind
    print(policy, depth, num_ahead, num_behind)
