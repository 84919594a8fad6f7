"""Drafts: the same tokens as transformers', greedy and drawn, and how much sooner they come."""

from __future__ import annotations

import random

from bench import speculation
from tests.acceptance.adapters import run_fleet
from tests.acceptance.harness import Point, Result
from tests.acceptance.reference import Reference
from tests.acceptance.serve import SAMPLERS, Prompts, ask_all, metric, run_tests
from tests.helpers.default_model import default_model_dir
from tests.helpers.server import Server

NUM_DRAFTED = 8
# Blocks for few of the requests at once, so that some give way.
OPTIONS = (
    "--speculative-tokens", str(NUM_DRAFTED), "--num-blocks", "64",
    "--max-batch-prefill-tokens", "192",
)  # fmt: skip
NUM_GREEDY, NUM_SEEDED = 32, 16
MIN_ALONE, MIN_MANY = 1.8, 1.0


def point_exact() -> Result:
    """Bit for bit on toy models: preempted, swapped, cancelled, on several ranks."""
    return run_tests(
        "tests/integration/test_speculation.py", "tests/integration/test_rank_engines.py",
        "tests/unit/engine/test_drafts.py", "tests/unit/engine/test_earlier_places.py",
        "tests/unit/engine/test_pass_prices.py", "tests/unit/core/test_booking.py",
    )  # fmt: skip


def point_equality() -> Result:
    """Greedy and drawn tokens of the default model against transformers, some preempted."""
    model_dir = default_model_dir()
    prompts, rng = Prompts(model_dir, seed=12), random.Random(12)
    shape = {"ignore_eos_token": True}
    greedy = [
        (*prompts.make(rng.randint(40, 300)), shape | {"max_new_tokens": rng.randint(20, 120)})
        for _ in range(NUM_GREEDY)
    ]
    drawn = [
        (
            *prompts.make(rng.randint(40, 300)),
            shape | SAMPLERS[i % len(SAMPLERS)]
            | {"max_new_tokens": 64, "do_sample": True, "seed": 500 + i},
        )
        for i in range(NUM_SEEDED)
    ]  # fmt: skip
    with Server(*OPTIONS) as server:
        answers = ask_all(server, [*greedy, *drawn], spread_s=1)
        preempted = metric(server, "lorax_requests_preempted")
        drafted, kept = speculation.counts(server)
    for served, (_, _, parameters) in zip(answers[NUM_GREEDY:], drawn, strict=True):
        served.parameters = {
            key: value for key, value in parameters.items()
            if key not in ("max_new_tokens", "ignore_eos_token", "do_sample")
        }  # fmt: skip
    reference = Reference(model_dir)
    first = reference.check_greedy(answers[:NUM_GREEDY])
    second = reference.check_draws(answers[NUM_GREEDY:])
    return Result(
        first.ok and second.ok and preempted > 0 and kept > 0,
        f"greedy: {first}; drawn: {second}; {preempted:.0f} preemptions, "
        f"{kept:.0f} of {drafted:.0f} drafted tokens kept",
    )


def point_adapters() -> Result:
    """Many adapters in one batch, against PEFT."""
    return run_fleet("--speculative-tokens", str(NUM_DRAFTED))


def point_speed() -> Result:
    """Twenty prompts alone, and thirty-two requests at once, with and without drafts."""
    ratios = speculation.compare(NUM_DRAFTED, num_new=128, rows=(1, 32), rounds=3)
    figure = ", ".join(f"{rows} rows {ratio:.2f}x" for rows, ratio in ratios.items())
    return Result(ratios[1] >= MIN_ALONE and ratios[32] >= MIN_MANY, figure)


POINTS = [
    Point("5x", "drafts change no token of toy models", point_exact),
    Point("5e", "drafts change no token of the default model", point_equality),
    Point("5a", "drafts change no token of adapters", point_adapters),
    Point("5s", "what drafts save", point_speed),
]
