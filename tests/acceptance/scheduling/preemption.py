"""Who gives way comes back: computed again, or from host memory, with the same tokens."""

from __future__ import annotations

import random
import re

from tests.acceptance.adapter_fleet import Stream, run_streams
from tests.acceptance.harness import Point, Result
from tests.acceptance.reference import Reference
from tests.acceptance.serve import Prompts, run_tests
from tests.helpers.default_model import default_model_dir
from tests.helpers.server import Server

NUM_STEPS = 10_000
NUM_REQUESTS, BLOCK_SIZE = 30, 16


def point_toy() -> Result:
    """State machine, crowds over a fifth of their demand, and engines of one and of several ranks."""
    return run_tests(
        "tests/unit/core/test_scheduler_machine.py",
        "tests/unit/core/test_swapping.py",
        "tests/unit/engine/test_copies.py",
        "tests/unit/attention/test_swap_space.py",
        "tests/integration/test_scheduler_drives_engine.py",
        "tests/integration/test_rank_engines.py",
        env={"LORAX_MACHINE_STEPS": str(NUM_STEPS)},
    )


def point_choice() -> Result:
    """The faster way is taken, for links of five rates."""
    return run_tests("tests/unit/simulator/test_swapping.py")


def _count(metrics: str, name: str) -> float:
    found = re.search(rf"^{name}(?:_total)? (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _crowd(prompts: Prompts) -> list[Stream]:
    rng = random.Random(11)
    streams = []
    for _ in range(NUM_REQUESTS):
        text, ids = prompts.make(rng.randint(30, 90))
        parameters = {"max_new_tokens": rng.randint(40, 90), "ignore_eos_token": True}
        streams.append(Stream(text, ids, parameters))
    return streams


def _run(reference: Reference, prompts: Prompts, *options: str, swaps: bool) -> tuple[bool, str]:
    """Serve a crowd from a pool of a fifth of what it needs, and judge the tokens."""
    streams = _crowd(prompts)
    needed = sum(-(-(len(s.ids) + s.parameters["max_new_tokens"]) // BLOCK_SIZE) for s in streams)
    pool = needed // 5
    with Server(
        "--num-blocks", str(pool), "--block-size", str(BLOCK_SIZE), "--max-total-tokens", "256",
        "--max-input-length", "128", "--max-batch-size", "24", "--max-batch-prefill-tokens", "128",
        *options,
    ) as server:  # fmt: skip
        run_streams(server.url, streams)
        metrics = server.get("/metrics")
    preempted = _count(metrics, "lorax_requests_preempted")
    swapped = _count(metrics, "lorax_requests_swapped_out")
    held = _count(metrics, "lorax_kv_host_blocks_held")
    failed = [each for each in streams if each.error]
    short = [s for s in streams if len(s.tokens) != s.parameters["max_new_tokens"]]
    verdict = reference.check_greedy([each.served for each in streams if each.tokens])
    ok = verdict.ok and not failed and not short and preempted > 0 and not held
    ok = ok and (swapped > 0) == swaps
    figure = (
        f"{pool} of {needed} blocks, {len(streams) - len(failed)} of {len(streams)} finished, "
        f"{preempted:.0f} gave way, {swapped:.0f} swapped; {verdict}"
    )
    return ok, figure


def point_server() -> Result:
    """The real model: recompute, swap, and swap with what the cache lets go."""
    model_dir = default_model_dir()
    reference, prompts = Reference(model_dir), Prompts(model_dir, seed=5)
    runs = {
        "recompute": (("--swap-space", "0"), False),
        "swap": (("--swap-space", "0.5", "--swap-cached-blocks", "false"), True),
        "swap without a prefix cache": (("--swap-space", "0.5", "--prefix-caching", "false"), True),
        "swap and cached blocks": (("--swap-space", "0.5"), True),
    }
    is_ok, figures = True, []
    for name, (options, swaps) in runs.items():
        ok, figure = _run(reference, prompts, *options, swaps=swaps)
        print(f"    {name}: {figure}", flush=True)
        is_ok &= ok
        figures.append(f"{name}: {figure}")
    return Result(is_ok, "; ".join(figures))


POINTS = [
    Point(
        "3a", "toy models give the same bits, whoever gives way, and nobody stands still", point_toy
    ),
    Point("3b", "recompute or swap: the faster way for the link", point_choice),
    Point("3c", "a fifth of the pool serves everybody, by the reference's tokens", point_server),
]
