"""Steps launched ahead: the same answers, nothing that waits, and how soon they follow each other."""

from __future__ import annotations

import logging

import torch
from bench import launches
from tests.acceptance.engine.served import compare_served
from tests.acceptance.harness import Point, Result
from tests.acceptance.serve import run_tests
from tests.helpers.overlapped import answered, mixed_requests

from lorax_shard.sampling.batched import draw_batch

NUM_REQUESTS = 500
NUM_ROWS, MAX_MS = 256, 1.0
# Of passes of several rows so many fail, in a third and a fourth run.
FAILING = 0.05


def point_toy() -> Result:
    """Five hundred requests of all kinds, at depth 1 and at 2, whose ids are read early or late.

    Without passes that fail at random, and with.
    """
    # Some fail, as they should.
    logging.disable(logging.CRITICAL)
    different, seen, preempted = 0, 0, 0
    for seed, drafts, method in ((1, False, None), (2, True, None), (3, False, draw_batch)):
        requests = mixed_requests(NUM_REQUESTS, seed)
        cancelled = [spec.request_id for spec in requests[::17]]
        one, *others = (
            answered(
                requests, depth, drafts=drafts, method=method, cancelled=cancelled, failing=failing
            )
            for depth, failing in ((1, 0.0), (2, 0.0), (1, FAILING), (2, FAILING))
        )
        preempted += others[0][1].stats().num_preemptions
        for found, _ in others:
            for spec in requests:
                if spec.request_id not in cancelled:
                    seen += 1
                    expected = one[0][spec.request_id]
                    different += found[spec.request_id].bits() != expected.bits()
    logging.disable(logging.NOTSET)
    return Result(
        different == 0 and preempted > 0,
        f"{different} of {seen} answers differ between depth 1 and 2, passes that fail or not; {preempted} preemptions",
    )


def point_tests() -> Result:
    """Every equality and contract test of engines and shards, on one rank and on three."""
    return run_tests(
        "tests/unit/engine", "tests/unit/rpc", "tests/unit/core/test_suspects.py", "tests/contract",
        *(
            f"tests/integration/test_{name}.py"
            for name in (
                "overlapped_steps", "scheduler_drives_engine", "rank_engines", "speculation",
                "engine_soak", "shard_rpc", "shard_service", "shard_adapters", "seeded_sampling",
                "default_model_rows", "swapped_default_model", "structured_output",
                "activated_adapters", "lora_parity", "broken_device", "batching_modes",
            )
        ),
    )  # fmt: skip


def point_real() -> Result:
    """Greedy and drawn tokens of the default model on a server that launches ahead."""
    return compare_served(seed=21)


def point_between() -> Result:
    """From one launch to the next where passes and draws cost nothing."""
    torch.set_num_threads(1)
    shown, is_ok = [], True
    for kind in ("greedy", "top-p"):
        found = [
            launches.between_launches(NUM_ROWS, 120, launches.KINDS[kind], depth=2)
            for _ in range(7)
        ]
        is_ok &= min(found) < MAX_MS
        shown.append(f"{kind} {min(found):.2f} to {max(found):.2f} ms")
    return Result(is_ok, f"{NUM_ROWS} rows, medians of 120 steps: {', '.join(shown)}")


def point_counts() -> Result:
    """What waits, and how much is launched, whatever the rows."""
    return run_tests("tests/unit/engine/test_launches.py", "tests/unit/sampling/test_methods.py")


POINTS = [
    Point("1x", "steps launched ahead give the same answers, bit for bit", point_toy),
    Point("1t", "equality and contract tests", point_tests),
    Point("1r", "the default model's tokens, on a server that launches ahead", point_real),
    Point("2", "less than a millisecond from launch to launch at 256 rows", point_between),
    Point("2c", "waits and launches are counted", point_counts),
]
