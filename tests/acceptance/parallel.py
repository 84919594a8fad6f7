"""Tensor-parallel shards and model families: the points of its "Done means" list."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.acceptance.harness import Point, Result
from tests.acceptance.rank_runs import FAMILIES, WORLD_SIZES, make_world, run_worlds
from tests.acceptance.rank_verdicts import RankVerdict, judge

# --- 1: ranks compute what one process computes ------------------------------------


def point_tiny_models() -> Result:
    """Processes over gloo: six families, eight mixed adapters, chunks, preemption."""
    whole = RankVerdict()
    with tempfile.TemporaryDirectory() as name:
        worlds = {family: make_world(family, Path(name) / family) for family in FAMILIES}
        for size in WORLD_SIZES:
            run_worlds([world.root for world in worlds.values()], size)
        for family, world in worlds.items():
            own = judge(world)
            print(f"    {family}: {own}", flush=True)
            whole.take(own)
    return Result(whole.ok, str(whole))


POINTS = [
    Point(
        "1", "TP = 1, 2, 3, 4 over gloo as one process: logits, greedy tokens", point_tiny_models
    ),
]
