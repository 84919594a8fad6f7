"""What drawing the tokens of a step takes, by what rows ask for."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from bench.gpu_check.measure import launches, seconds
from bench.gpu_check.report import Report
from numpy.typing import NDArray

from lorax_contract.step import SamplingParams
from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.sampler import SamplesRows, best_method
from lorax_shard.sampling.watermark import Watermark

# As a model's: some hundred tokens have most of the chance.
_SPREAD = 3.0
_OUTPUT, _PROMPT = 100, 500
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "everything": {
        "temperature": 0.8, "top_k": 50, "top_p": 0.95, "typical_p": 0.95, "min_p": 0.01,
        "repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1,
        "num_alternatives": 5,
    },
}  # fmt: skip

# Kinds that are drawn by tensor operations, too.
_COMPARED = ("greedy", "top-p")


class DrawnRow(NamedTuple):
    """A row as the sampler sees it."""

    params: SamplingParams
    token_ids: NDArray[np.int64]
    num_prompt_tokens: int = _PROMPT
    num_tokens: int = _PROMPT + _OUTPUT
    edits: None = None


def fastest(device: torch.device) -> SamplesRows:
    """Return what draws on a device; on a CPU, what would draw on a GPU."""
    if device.type != "cpu":
        return best_method(device)
    from lorax_shard.sampling.triton.backend import TritonDraws

    return TritonDraws()


def drawing_table(
    report: Report,
    method: SamplesRows,
    rows: tuple[int, ...],
    vocab_size: int,
    device: torch.device,
) -> None:
    """Fill the table of draws, beside those by tensor operations."""
    report.table(
        f"Drawing from {vocab_size} tokens",
        ("rows", "what rows ask for", "eager, ms", "host's part, ms", "launches",
         "tensor operations, ms", "their launches"),
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(1)
    watermark = Watermark()
    for num_rows in rows:
        logits = torch.randn(num_rows, vocab_size, generator=generator, device=device) * _SPREAD
        for kind, settings in KINDS.items():
            batch = [_row(number, settings, vocab_size) for number in range(num_rows)]
            # As many whatever the rows are.
            counts = num_rows == rows[0]
            ours = partial(method, logits, batch, watermark)
            figures: list[float | None] = [
                _milliseconds(ours, device),
                1e3 * _host_seconds(ours, device),
            ]
            figures.append(launches(ours, device).num if counts else None)
            others = partial(draw_batch, logits, batch, watermark)
            is_compared = kind in _COMPARED
            figures.append(_milliseconds(others, device) if is_compared else None)
            figures.append(launches(others, device).num if is_compared and counts else None)
            report.row(num_rows, kind, *figures)


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    return 1e3 * seconds(call, device, budget_s=0.2, most=10)


def _row(number: int, settings: dict[str, Any], vocab_size: int) -> DrawnRow:
    ids = (np.arange(_PROMPT + _OUTPUT) * 31 + number) % vocab_size
    return DrawnRow(SamplingParams(do_sample=bool(settings), seed=number, **settings), ids)


def _host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes to return, the device having nothing to do before."""
    times = []
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[1]
