"""An urgent class beside a flood of work that can wait, on the real server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tests.acceptance.harness import Point, Result
from tests.acceptance.scheduling.traffic import Job, Traffic, failed
from tests.helpers.server import Server

NUM_URGENT, EVERY_S, FIRST_S = 60, 1.5, 3.0
NUM_PROMPT, NUM_OUTPUT = 32, 8
# More than fits, and longer than the run.
NUM_FLOOD, FLOOD_PROMPT, FLOOD_OUTPUT = 96, 64, 192
NUM_BLOCKS, BLOCK_SIZE = 128, 16
# A key's own class is 0; none may ask for better.
URGENT, PATIENT = 0, 5
# Tokens of one step come closer together.
APART_S = 0.01
MAX_STEPS = 2.0


def _urgent() -> list[Job]:
    return [
        Job(
            at=FIRST_S + i * EVERY_S, client=0, model="base", num_prompt=NUM_PROMPT,
            num_output=NUM_OUTPUT, priority=URGENT,
        )
        for i in range(NUM_URGENT)
    ]  # fmt: skip


def _flood() -> list[Job]:
    return [
        Job(
            at=0.0, client=1, model="base", num_prompt=FLOOD_PROMPT, num_output=FLOOD_OUTPUT,
            priority=PATIENT,
        )
        for _ in range(NUM_FLOOD)
    ]  # fmt: skip


def _p99_wait(jobs: Sequence[Job]) -> float:
    return float(np.percentile([job.wait_s for job in jobs], 99))


def _steps(jobs: Sequence[Job]) -> Sequence[float]:
    """Return the seconds between steps, as their tokens tell."""
    times = np.sort(np.concatenate([job.token_times for job in jobs]))
    begun = times[1:][np.diff(times) > APART_S]
    return np.diff(begun).tolist()


def point_classes() -> Result:
    """First tokens of the urgent beside a flood, against those alone and the flood's steps."""
    end = FIRST_S + NUM_URGENT * EVERY_S
    with Server(
        "--scheduling-policy", "priority", "--num-blocks", str(NUM_BLOCKS),
        "--block-size", str(BLOCK_SIZE), "--served-model-name", "base",
    ) as server:  # fmt: skip
        traffic = Traffic(server.url)
        alone, beside, flood = _urgent(), _urgent(), _flood()
        traffic.run(alone)
        traffic.run([*beside, *flood], end)
    if failed([*alone, *beside, *flood]):
        return Result(False, "; ".join(failed([*alone, *beside, *flood])))
    idle, flooded = _p99_wait(alone), _p99_wait(beside)
    step = float(np.percentile(_steps([*beside, *flood]), 99))
    num_flood = sum(len(job.token_times) for job in flood)
    figure = (
        f"p99 TTFT {flooded * 1e3:.0f} ms beside {NUM_FLOOD} patient requests "
        f"({num_flood} tokens meanwhile), {idle * 1e3:.0f} ms alone, p99 step {step * 1e3:.0f} ms"
    )
    return Result(flooded <= idle + MAX_STEPS * step and num_flood > 0, figure)


POINTS = [Point("6r", "urgent requests beside a flood on the real server", point_classes)]
