"""Beside other systems: the base model, adapters, and what continuous batching is worth.

Every point is a comparison of its own, with its peers in turns; `make bench-peers` sets them up,
and a point whose peer is not there says so and is short. Points that share a comparison run it
once. Durations on a quiet machine of two cores are in the points' titles.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.acceptance.harness import Point, Result
from tests.acceptance.speed.comparisons import RESULTS, ROUNDS, at_least, compared, in_words
from tests.helpers.default_model import default_model_dir

from lorax_bench.compare import MEASURES, ComparisonPlan, compare
from lorax_bench.demo import tell
from lorax_bench.peers.environments import Environments, PeerMissing

W1, LONG = "w1", "long-prompts"
# With adapters a peer takes minutes for what takes seconds here: fewer long prompts.
LONG_ADAPTERS = "long-prompts,requests=8"
_, FIRST_TOKEN, BETWEEN = MEASURES


BASE = (0, ("vllm", "openvino"), (W1, LONG))
EIGHT = (8, ("vllm",), (W1, LONG_ADAPTERS))
MANY = (32, ("vllm",), (W1, LONG_ADAPTERS))
TRANSFORMERS = (0, ("static", "continuous"), (W1,))


def point_first_token() -> Result:
    """The time to the first token beside vLLM's."""
    found = compared(*BASE)
    ratios = [each.ratio("vllm", FIRST_TOKEN).of_medians for each in found.values()]
    words = "; ".join(
        f"{spec} {in_words(each, 'vllm', FIRST_TOKEN)}" for spec, each in found.items()
    )
    gaps = ", ".join(in_words(each, "vllm", BETWEEN) for each in found.values())
    return Result(max(ratios) <= 0.8, f"{words} (<= 0.8); between tokens {gaps}")


def point_demo() -> Result:
    """The demonstration: the same output, so much faster."""
    story = tell(ROUNDS)
    low, high = story.speed_up.bounds
    return Result(
        story.sameness.ok and story.speed_up.of_medians >= 6.5,
        f"{story.speed_up.of_medians:.2f}x of {low:.2f}-{high:.2f} (>= 6.5); {story.sameness}",
    )


def point_peers_set_up() -> Result:
    """Peers are there before the comparison, which sets nothing up and says what is missing."""
    there = Environments.default()
    names = ("vllm", "openvino")
    missing = [name for name in names if not there.is_complete(name)]
    again = subprocess.run(
        ["make", "-n", "bench-peers"], cwd=RESULTS.parents[1], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        nowhere = Environments(Path(folder))
        try:
            plan = ComparisonPlan(peers=names)
            compare(plan, default_model_dir(), environments=nowhere)
            refusal = ""
        except PeerMissing as error:
            refusal = str(error)
        untouched = not list(Path(folder).iterdir())
    ok = not missing and again.returncode == 0 and "make bench-peers" in refusal and untouched
    return Result(ok, f"missing: {', '.join(missing) or 'none'}; without them: {refusal}"[:300])


POINTS = [
    Point("1b", "base: 1.4x vLLM on both workloads (20 min)", at_least(1.4, "vllm", *BASE)),
    Point("1o", "base: 1.0x OpenVINO GenAI on both", at_least(1.0, "openvino", *BASE)),
    Point("1t", "base: first token after 0.8x of vLLM's time", point_first_token),
    Point("1a8", "8 adapters: 5x vLLM with 8 (25 min)", at_least(5.0, "vllm", *EIGHT)),
    Point("1a32", "32 adapters: 5x vLLM with 32 (25 min)", at_least(5.0, "vllm", *MANY)),
    Point("3s", "5x static batches (7 min)", at_least(5.0, "static", *TRANSFORMERS)),
    Point("3c", "3x transformers' own batching", at_least(3.0, "continuous", *TRANSFORMERS)),
    Point("3p", "8 adapters: 14x PEFT's mixed batches (5 min)",
          at_least(14.0, "peft", 8, ("peft",), (W1,))),
    Point("3d", "the demonstration: 6.5x (3 min)", point_demo),
    Point("8p", "peers are set up by a make target", point_peers_set_up),
]  # fmt: skip
