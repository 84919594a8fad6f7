"""The stages in their order, and what each may take."""

from __future__ import annotations

from typing import NamedTuple


class CheckStage(NamedTuple):
    """One part of the check; it fails alone."""

    name: str
    module: str  # has run(report, small)
    title: str
    budget_s: float


# All together stay below nine minutes.
STAGES = (
    CheckStage("contracts", "bench.gpu_check.contracts", "Contract suites on every backend", 110),
    CheckStage("parity", "bench.gpu_check.parity", "Parity with the CPU reference", 70),
    CheckStage(
        "tables", "bench.gpu_check.tables", "Steps of an 8B-shaped model beside the floor", 165
    ),
    CheckStage("serving", "bench.gpu_check.serving", "End to end", 75),
    CheckStage("peer", "bench.gpu_check.peer", "The same requests by transformers", 45),
    CheckStage("ranks", "bench.gpu_check.ranks", "Two ranks on one GPU", 50),
)
BY_NAME = {stage.name: stage for stage in STAGES}
