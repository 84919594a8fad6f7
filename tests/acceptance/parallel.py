"""Tensor-parallel shards and model families: the points of its "Done means" list."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.acceptance.harness import Point, Result
from tests.acceptance.rank_memory import point_memory
from tests.acceptance.rank_runs import FAMILIES, WORLD_SIZES, make_world, run_worlds
from tests.acceptance.rank_servers import point_default_model, point_endings
from tests.acceptance.rank_verdicts import RankVerdict, judge
from tests.acceptance.suites import point_contracts, point_families, point_gpu, point_namespaces
from transformers.utils import logging

# --- 1: ranks compute what one process computes ------------------------------------


def point_tiny_models() -> Result:
    """Processes over gloo: six families, eight mixed adapters, chunks, preemption."""
    # Bars and advice of transformers, once for each of dozens of tiny models.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
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
        "1",
        "TP = 1, 2, 3, 4 over gloo, passes that fail among them, as one process: logits, greedy tokens",
        point_tiny_models,
    ),
    Point("1d", "the embedded default at 2 and 3 ranks, three demo adapters", point_default_model),
    Point("2", "make serve with 2 ranks; one is lost, and the group ends as one", point_endings),
    Point("3", "contract suites of attention and LoRA, by backend", point_contracts),
    Point("4", "memory of each of two ranks below 0.6x of one process's", point_memory),
    Point("5", "every family with two adapters; planted faults caught", point_families),
    Point("6", "ranks in two network namespaces serve", point_namespaces),
    Point("7", "make gpu-check", point_gpu),
]
