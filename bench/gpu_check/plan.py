"""The stages in their order, and what each may take."""

from __future__ import annotations

from typing import NamedTuple


class CheckStage(NamedTuple):
    """One part of the check; it fails alone."""

    name: str
    module: str  # has run(report, small)
    title: str
    budget_s: float
    # The first holds what matters most: where calls are short, one call is enough for it.
    part: int


# The first part stays below four minutes, both below nine.
STAGES = (
    CheckStage("preflight", "bench.gpu_check.preflight", "What the machine can do", 20, 1),
    CheckStage("tables", "bench.gpu_check.tables", "Steps of an 8B-shaped model beside the floor",
               130, 1),
    CheckStage("profile", "bench.gpu_check.profile", "What a step consists of", 30, 1),
    CheckStage("sweep", "bench.gpu_check.sweep", "Launch sizes side by side", 50, 1),
    CheckStage("correctness", "bench.gpu_check.correctness", "Contract suites of the kernels",
               80, 2),
    CheckStage("parity", "bench.gpu_check.parity", "Parity with the CPU reference", 65, 2),
    CheckStage("serving", "bench.gpu_check.serving", "End to end", 85, 2),
    CheckStage("peer", "bench.gpu_check.peer", "The same requests by transformers", 50, 2),
)  # fmt: skip
PARTS = sorted({stage.part for stage in STAGES})

# With --ranks, and nothing else then: they need as many GPUs. Below ten minutes.
RANK_STAGES = (
    CheckStage("ranks-parity", "bench.gpu_check.ranks.parity", "Parity of several ranks with one",
               150, 1),
    CheckStage("ranks-speed", "bench.gpu_check.ranks.speed", "Speed-up by several ranks", 150, 1),
    CheckStage("ranks-failures", "bench.gpu_check.ranks.failures", "A rank that is lost", 290, 1),
)  # fmt: skip
