"""What recording events costs a plan and an apply, and how large the log becomes.

The load ``decode`` of ``bench.planning``: 256 rows get a token in each step. Runs with and
without a log take turns; the medians are of processor time of the thread that plans.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

from bench.planning import SHAPES, PlanningLoad

from lorax_router.core.settings import CoreSettings, make_scheduler
from lorax_router.event_log.recording import recorded_scheduler
from lorax_router.event_log.writer import EventLogWriter

NUM_ROUNDS = 5


def measure(policy: str, path: Path | None) -> tuple[float, float, float]:
    """Return the milliseconds of a plan and an apply, those of a whole step, and bytes a step."""
    writer: EventLogWriter | None = None

    def make(settings: CoreSettings):  # type: ignore[no-untyped-def]
        nonlocal writer
        if path is None:
            return make_scheduler(settings)
        writer = EventLogWriter(path, settings, max_bytes=1 << 30)
        return recorded_scheduler(settings, writer)

    load = PlanningLoad(policy, SHAPES["decode"], make=make)
    load.fill()
    before = path.stat().st_size if path else 0
    start = perf_counter()
    load.measure()
    seconds = perf_counter() - start
    if writer is not None:
        writer.close()
    num_bytes = (path.stat().st_size if path else 0) - before
    step_s = statistics.median(load.plan_s) + statistics.median(load.apply_s)
    return step_s * 1e3, seconds / len(load.plan_s) * 1e3, num_bytes / len(load.plan_s)


def main() -> None:
    """Print the figures, and write them as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="fair")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    off, on, sizes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(NUM_ROUNDS):
            off.append(measure(arguments.policy, None)[0])
            step_ms, _, size = measure(arguments.policy, Path(folder, f"events-{number}"))
            on.append(step_ms)
            sizes.append(size)
    figures = {
        "off_ms": round(min(off), 4),
        "on_ms": round(min(on), 4),
        "cost": round(min(on) / min(off) - 1, 4),
        "bytes_per_step": round(statistics.median(sizes)),
    }
    print(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
