"""Event logs: what a live server planned is planned again, offline, bit for bit.

``python -m tests.acceptance.scheduling.replay`` runs these points alone.
"""

from __future__ import annotations

import concurrent.futures
import random
import sys
import tempfile
from pathlib import Path

from tests.acceptance.harness import Point, Result, run_points
from tests.acceptance.serve import ROOT, run_bench, run_tests
from tests.helpers.server import Server

from lorax_router.event_log.replay import replay

_NUM_REQUESTS = 60
_MOST_COST = 0.05
_ADAPTERS = [None, "pirate", "sentiment", "json-only"]
_SAID = "You are one of many and answer each question in a few words that all can understand. " * 8


def _ask(server: Server, number: int) -> None:
    draw = random.Random(number)
    parameters = {
        "max_new_tokens": draw.choice([1, 8, 48]), "do_sample": True, "seed": number,
        "ignore_eos_token": True, "priority": draw.randrange(3),
    }  # fmt: skip
    if (adapter := draw.choice(_ADAPTERS)) is not None:
        parameters |= {"adapter_id": adapter, "adapter_source": "local"}
    question = " ".join(str(draw.randrange(1000)) for _ in range(draw.randint(1, 40)))
    said = _SAID if draw.random() < 0.5 else ""
    server.post("/generate", {"inputs": f"{said}What is {question}?", "parameters": parameters})


def point_live_run() -> Result:
    """The default model, adapters in turns, little memory; then a replay in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "events")
        options = [
            "--record-events", str(path), "--adapter-local-root", str(ROOT / "examples/adapters"),
            "--max-batch-total-tokens", "2048", "--max-active-adapters", "2",
            "--adapter-cycle-time-s", "1",
        ]  # fmt: skip
        with Server(*options) as server:
            with concurrent.futures.ThreadPoolExecutor(_NUM_REQUESTS) as pool:
                for done in [pool.submit(_ask, server, each) for each in range(_NUM_REQUESTS)]:
                    done.result()
            code = server.stop()
        replayed = replay(path)
        size = path.stat().st_size
    figure = (
        f"{replayed.num_plans} plans of {replayed.num_events} events in {size:,} bytes: "
        f"{replayed.difference or 'all the same'} ({replayed.end}, exit code {code})"
    )
    return Result(not replayed.difference and replayed.end == "closed", figure)


def point_kinds_of_logs() -> Result:
    """Other policies, killed routers, changed plans, other versions, other processes' hashes."""
    return run_tests("tests/integration/test_record_events.py", "tests/unit/event_log")


def point_cost() -> Result:
    """What recording adds to planning and applying."""
    figures = run_bench("event_log")
    figure = f"{figures['cost']:+.1%} of {figures['off_ms']} ms, {figures['bytes_per_step']} bytes"
    return Result(figures["cost"] < _MOST_COST, f"{figure} a step of 256 rows")


POINTS = [
    Point("8", "a recorded live run gives the same plans offline", point_live_run),
    Point("8t", "logs of all policies, torn, changed, of another version", point_kinds_of_logs),
    Point("8c", "recording costs less than 5 % of plan and apply", point_cost),
]

if __name__ == "__main__":
    sys.exit(run_points(POINTS, set(sys.argv[1:])))
