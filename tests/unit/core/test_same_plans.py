"""What is placed or planned ahead of an outcome changes nothing: random work, turned either way."""

from __future__ import annotations

import os
from collections import Counter
from itertools import zip_longest
from typing import Any

import pytest
from tests.helpers.core_policies import POLICIES
from tests.helpers.engine_turns import EngineTurns

NUM_RUNS = int(os.environ.get("LORAX_MACHINE_STEPS", "1500")) // 12
NUM_TURNS = 80


# What was found in long runs.
FOUND = {"priority": [20_104]}


@pytest.mark.parametrize("policy", POLICIES)
def test_plans_are_the_same_as_without(policy: str) -> None:
    """Who runs, waits, ends or gives way, what each tenant got and what is cached, in each turn."""
    counts: Counter[str] = Counter()
    for seed in (*range(NUM_RUNS), *FOUND.get(policy, [])):
        plain = EngineTurns(policy, seed)
        prepared = EngineTurns(policy, seed, prepares=True)
        behind = EngineTurns(policy, seed, prepares=True, plans_behind=True)
        for work in (plain, prepared, behind):
            work.run(NUM_TURNS)
        _verify_same(plain.told, prepared.told, f"prepared, seed {seed}")
        _verify_same(plain.blocks, prepared.blocks, f"prepared, seed {seed}, blocks")
        # Those of rows that ended are free when the outcome is applied, and not before.
        _verify_same(plain.told, behind.told, f"planned behind, seed {seed}")
        counts += Counter(prepared=prepared.num_placed_ahead, behind=behind.num_behind)
    assert counts["prepared"] > 7 * NUM_RUNS
    assert counts["behind"] > 5 * NUM_RUNS


def _verify_same(expected: list[Any], found: list[Any], where: str) -> None:
    for number, (one, other) in enumerate(zip_longest(expected, found)):
        assert one == other, f"{where}, value {number}"
