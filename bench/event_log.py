"""What recording events adds to a plan and an apply, and how large the log becomes.

The load ``decode`` of ``bench.planning``: 256 rows get a token in each step. The calls are timed
from outside and from within, in one run, so that neighbours on the machine do not count: what is
between is what recording costs the thread that plans. Another one writes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from time import thread_time
from typing import Any

from bench.planning import SHAPES, PlanningLoad

from lorax_router.core.scheduler import Scheduler
from lorax_router.core.settings import CoreSettings
from lorax_router.event_log.recording import recorded_scheduler
from lorax_router.event_log.writer import EventLogWriter


def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return a method whose calls are timed."""

    @wraps(method)
    def call(*args: Any) -> Any:
        start = thread_time()
        try:
            return method(*args)
        finally:
            seconds.append(thread_time() - start)

    return call


def measure(policy: str, path: Path) -> dict[str, float]:
    """Return the milliseconds of a step's plan and apply, what recording adds, and its bytes."""
    within: dict[str, list[float]] = {"plan": [], "apply": []}
    for name, seconds in within.items():
        setattr(Scheduler, name, timed(getattr(Scheduler, name), seconds))
    writers: list[EventLogWriter] = []

    def make(settings: CoreSettings) -> Scheduler:
        writers.append(EventLogWriter(path, settings, max_bytes=1 << 30))
        return recorded_scheduler(settings, writers[0])

    load = PlanningLoad(policy, SHAPES["decode"], make=make)
    load.fill()
    before = path.stat().st_size
    load.measure()
    writers[0].close()
    num = len(load.plan_s)
    outer = sum(load.plan_s) + sum(load.apply_s)
    inner = sum(within["plan"][-num:]) + sum(within["apply"][-len(load.apply_s) :])
    return {
        "off_ms": round(inner / num * 1e3, 4),
        "cost": round(outer / inner - 1, 4),
        "bytes_per_step": round((path.stat().st_size - before) / num),
    }


def main() -> None:
    """Print the figures, and write them as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="fair")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.policy, Path(folder, "events"))
    print(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
