"""More adapters than slots, on the real server: what taking turns costs."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tests.acceptance.harness import Point, Result
from tests.acceptance.scheduling.traffic import Job, Traffic, failed
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.server import Server

NUM_SLOTS = 8
# Adapters in use, in slots: what fits first.
SETS = (1, 2, 4)
# At once are two for each adapter of the largest set: with one for each, those of eight adapters
# would not fill the batch, and slots are what is lacking, whatever the order.
NUM_REQUESTS, AT_ONCE, NUM_RUNS = 256, 64, 3
NUM_PROMPT, NUM_OUTPUT = 32, 32
# Rows for a quarter of those at once: others wait in any case.
NUM_BLOCKS, BLOCK_SIZE = 64, 16
MIN_THROUGHPUT, MAX_WAIT = 0.9, 3.0


def _jobs(models: Sequence[str], seed: int) -> list[Job]:
    draw = random.Random(seed)
    return [
        Job(
            at=0.0, client=0, model=draw.choice(models), num_prompt=NUM_PROMPT,
            num_output=NUM_OUTPUT,
        )
        for _ in range(NUM_REQUESTS)
    ]  # fmt: skip


def _measure(server: Server, models: Sequence[str], seed: int) -> tuple[float, float]:
    """Return tokens a second, and the 99th percentile of first tokens in seconds.

    Tokens count as long as so many ask at once: of the last ones, which nobody replaces, each
    adapter has a request or two, and no order fills a batch from the few adapters that fit.
    """
    jobs = _jobs(models, seed)
    Traffic(server.url, seed=seed).run_closed(jobs, AT_ONCE)
    assert not failed(jobs), failed(jobs)
    waits = [job.wait_s for job in jobs]
    all_ask = max(job.sent_at for job in jobs)
    num_tokens = sum(time <= all_ask for job in jobs for time in job.token_times)
    return num_tokens / all_ask, float(np.percentile(waits, 99))


def point_working_set() -> Result:
    """Throughput and first tokens with twice and four times the adapters that fit."""
    with tempfile.TemporaryDirectory() as name:
        root, model_dir = Path(name), default_model_dir()
        models = [
            str(write_formula_adapter(model_dir, root / f"a{i}", rank=8, seed=i))
            for i in range(NUM_SLOTS * max(SETS))
        ]
        with Server(
            "--max-active-adapters", str(NUM_SLOTS), "--adapter-local-root", str(root),
            "--num-blocks", str(NUM_BLOCKS), "--block-size", str(BLOCK_SIZE),
            "--default-adapter-source", "local",
        ) as server:  # fmt: skip
            # Each is fetched and prepared once: turns are measured, not first times.
            Traffic(server.url).run_closed([_short(model) for model in models], AT_ONCE)
            runs = [
                [_measure(server, models[: size * NUM_SLOTS], seed) for size in SETS]
                for seed in range(NUM_RUNS)
            ]
    return _judge(runs)


def _short(model: str) -> Job:
    return Job(at=0.0, client=0, model=model, num_prompt=4, num_output=1)


def _judge(runs: Sequence[Sequence[tuple[float, float]]]) -> Result:
    """Compare within each run, in which all sizes take turns."""
    shown, is_ok = [], True
    for place, size in list(enumerate(SETS))[1:]:
        rates = [run[place][0] / run[0][0] for run in runs]
        waits = [run[place][1] / run[0][1] for run in runs]
        rate, wait = statistics.median(rates), statistics.median(waits)
        is_ok &= rate >= MIN_THROUGHPUT and wait <= MAX_WAIT
        shown.append(
            f"{size}x the slots: {rate:.2f}x of the throughput ({min(rates):.2f}-{max(rates):.2f}), "
            f"p99 TTFT {wait:.2f}x ({min(waits):.2f}-{max(waits):.2f})"
        )
    rate, wait = runs[0][0]
    return Result(is_ok, f"fits: {rate:.0f} tokens/s, p99 {wait:.1f} s; {'; '.join(shown)}")


POINTS = [Point("2r", "a working set of 2x and 4x the slots", point_working_set)]
