"""Loads a model as a shard does and measures its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lorax_bench.steps.engine import make_engine
from lorax_bench.steps.measure import MeasuredStep, StepBench
from lorax_contract.cache import default_cache_dir
from lorax_shard.prepare.prepare import prepare


def measure_steps(
    model_dir: Path | None,
    rows: Sequence[int],
    prompts: Sequence[int],
    *,
    context: int = 128,
    rounds: int = 5,
    calls: int = 5,
    threads: int = 0,
    linear: str = "auto",
) -> list[MeasuredStep]:
    """Return decode steps of so many rows each, and steps of a prompt of so many tokens each.

    ``model_dir`` None: of the embedded default model. ``threads`` 0: as many as torch takes.
    """
    model_dir = model_dir or _default_model_dir()
    if threads:
        torch.set_num_threads(threads)
    engine = make_engine(
        model_dir, context=context, max_rows=max(rows, default=1),
        max_tokens=max(prompts, default=context), linear=linear,
    )  # fmt: skip
    return StepBench(engine).run(rows, prompts, context=context, rounds=rounds, calls=calls)


def _default_model_dir() -> Path:
    prepared = prepare(
        None,
        revision=None,
        source="hub",
        cache_dir=default_cache_dir(),
        trust_remote_code=False,
        progress=lambda event: None,
    )
    return prepared.model_dir
