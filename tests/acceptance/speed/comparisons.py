"""Comparisons with peers that points share: run once, kept in a file, read by ratios."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from tests.acceptance.harness import Result
from tests.helpers.default_model import default_model_dir

from lorax_bench.compare import MEASURES, Comparison, ComparisonPlan, as_results, compare
from lorax_bench.document import save
from lorax_bench.peers.environments import Environments

ROUNDS = 3
RESULTS = Path(__file__).parents[3] / "bench" / "results"


@functools.cache
def compared(
    num_adapters: int, peers: tuple[str, ...], workloads: tuple[str, ...]
) -> dict[str, Comparison]:
    """Run a comparison once for all points that read it; its results are kept in a file."""
    plan = ComparisonPlan(workloads=workloads, adapters=(num_adapters,), peers=peers, rounds=ROUNDS)
    environments = Environments.default()
    found = compare(
        plan, default_model_dir(), environments=environments,
        told=lambda line: print(f"    {line}", flush=True),
    )  # fmt: skip
    name = f"compare-{num_adapters}-adapters-{'-'.join(peers)}.json"
    save(as_results(plan, found, environments), RESULTS / name)
    return {each.workload: each for each in found}


def at_least(
    bound: float, peer: str, num_adapters: int, peers: tuple[str, ...], workloads: tuple[str, ...]
) -> Callable[[], Result]:
    """Make the measure of a point: so many times a peer's tokens per second, on each workload."""

    def measure() -> Result:
        found = compared(num_adapters, peers, workloads)
        ratios = {spec: each.ratio(peer) for spec, each in found.items()}
        return Result(
            all(ratio.of_medians >= bound for ratio in ratios.values()),
            "; ".join(f"{spec} {in_words(found[spec], peer)}" for spec in ratios)
            + f" (>= {bound:g})",
        )

    return measure


def in_words(found: Comparison, peer: str, measure: str = MEASURES[0]) -> str:
    """Return the ratio of medians, and the bounds of single rounds."""
    ratio = found.ratio(peer, measure)
    low, high = ratio.bounds
    return f"{ratio.of_medians:.2f}x of {low:.2f}-{high:.2f}"
