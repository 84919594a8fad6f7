"""Requests to a server of the default model, and their tokens beside transformers' choices."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.acceptance.harness import Result
from tests.acceptance.reference import Reference
from tests.acceptance.serve import SAMPLERS, Prompts, ask_all, metric
from tests.helpers.default_model import default_model_dir
from tests.helpers.server import Server

NUM_GREEDY, NUM_SEEDED = 32, 16
# Blocks for few of the requests at once, so that some give way.
_OPTIONS = ("--num-blocks", "64", "--max-batch-prefill-tokens", "192")
_NOT_SAMPLING = ("max_new_tokens", "ignore_eos_token", "do_sample")


def compare_served(
    *options: str, seed: int, look: Callable[[Server], tuple[bool, str]] = lambda _: (True, "")
) -> Result:
    """Check greedy and drawn tokens; ``look`` judges what else the server shows, in words."""
    model_dir = default_model_dir()
    prompts, rng = Prompts(model_dir, seed=seed), random.Random(seed)
    shape: dict[str, Any] = {"ignore_eos_token": True}
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
    with Server(*_OPTIONS, *options) as server:
        answers = ask_all(server, [*greedy, *drawn], spread_s=1)
        preempted = metric(server, "lorax_requests_preempted")
        looks_well, seen = look(server)
    for served, (_, _, parameters) in zip(answers[NUM_GREEDY:], drawn, strict=True):
        served.parameters = {
            key: value for key, value in parameters.items() if key not in _NOT_SAMPLING
        }
    reference = Reference(model_dir)
    first = reference.check_greedy(answers[:NUM_GREEDY])
    second = reference.check_draws(answers[NUM_GREEDY:])
    return Result(
        first.ok and second.ok and preempted > 0 and looks_well,
        f"greedy: {first}; drawn: {second}; {preempted:.0f} preemptions{seen}",
    )
