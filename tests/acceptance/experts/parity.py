"""Adapters on experts compute what PEFT computes: in the model, and served."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from tests.acceptance.adapter_fleet import Adapter, PeftReference, Stream, run_streams
from tests.acceptance.harness import Result
from tests.acceptance.rank_servers import judge
from tests.acceptance.suites import run_suite
from tests.helpers.expert_rows import FAMILIES, OLDER, OLDER_SLOT, make_older, options
from tests.helpers.peft_adapters import peft_model
from tests.helpers.server import Server
from tests.helpers.tiny_models import make_tiny_model
from tokenizers import Tokenizer

ADAPTERS = "tests/integration/test_expert_adapters.py"
SERVED = ("mixtral", "gpt_oss", "qwen3_moe")
NUM_ROUNDS, NUM_TOKENS, MOST_DIFFERENCE = 3, 24, 1e-4
PLANTED = (f"{ADAPTERS}::test_fault_of_experts_is_found", f"{ADAPTERS}::test_fault_of_slots_is_found",
           "tests/integration/test_experts_oracle.py::test_a_planted_fault_is_seen")  # fmt: skip


def point_families() -> Result:
    """The rows of every family by three schedules, and by three ranks."""
    run = run_suite(f"{ADAPTERS}::test_eight_adapters_of_a_mixture")
    figures = dict(each.rsplit(" ", 1) for each in run.figures)
    wanted = {*FAMILIES, *(f"{family} on 3 ranks" for family in FAMILIES)}
    largest = max(map(float, figures.values()), default=1.0)
    ok = run.is_whole and figures.keys() == wanted and largest <= MOST_DIFFERENCE
    return Result(ok, f"{len(FAMILIES)} families, largest relative difference {largest:.1e}")


def save_adapters(family: str, model: Path, root: Path) -> list[Adapter]:
    """Save an adapter for each of the options, one of them by linears of each expert."""
    found = []
    for number, each in enumerate(options(family)):
        folder = root / f"adapter-{number}"
        tuned = peft_model(model, seed=number, **each)
        tuned.save_pretrained(folder)
        if number == OLDER_SLOT and family in OLDER:
            make_older(tuned, folder, *OLDER[family])
        found.append(Adapter(str(folder), "local", folder))
    return found


def make_streams(model: Path, adapters: list[Adapter]) -> list[Stream]:
    """Return requests of every adapter and of the base, with prompts that repeat themselves."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    draw, streams = random.Random(1), []
    words = "adapter token server model request batch expert".split()
    for adapter in [*adapters, None] * NUM_ROUNDS:
        part = " ".join(draw.choices(words, k=draw.randrange(2, 9)))
        text = f"{part} and {part}"
        parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
        streams.append(Stream(text, tokenizer.encode(text).ids, parameters, adapter))
    return streams


def point_served() -> Result:
    """Greedy tokens of all adapters at once over HTTP, judged by PEFT."""
    parts, is_ok = [], True
    for family in SERVED:
        for size in (1, 3):
            with tempfile.TemporaryDirectory() as name:
                root = Path(name)
                model = make_tiny_model(family, root / "model")
                adapters = save_adapters(family, model, root)
                streams = make_streams(model, adapters)
                flags = (
                    "--model-id", str(model), "--num-shard", str(size), "--num-blocks", "256",
                    "--adapter-local-root", str(root), "--adapter-store-dir", str(root / "store"),
                    "--speculative-tokens", "3", "--max-active-adapters", str(len(adapters)),
                )  # fmt: skip
                with Server(*flags) as server:
                    run_streams(server.url, streams, spread_s=1)
                if failed := [each for each in streams if each.error or not each.tokens]:
                    return Result(False, f"{family}: {failed[0].error[:300]}")
                verdict, num_base_like = judge(PeftReference(model, "eager"), streams)
            ok = verdict.ok and num_base_like == 0 and verdict.max_difference <= 1e-3
            is_ok = is_ok and ok
            parts.append(f"{family} on {size}: {verdict}")
            print(f"    {parts[-1]}", flush=True)
    return Result(is_ok, "; ".join(parts))


def point_planted() -> Result:
    """Each fault is seen by the comparison that the first point makes."""
    run = run_suite(*PLANTED)
    passed = run.counts["passed"]
    faults = ("wrong expert", "factor of another", "ranks in another order", "scale lost")
    return Result(run.is_whole, f"{passed} tests: {', '.join(faults)}, wrong slots")


def point_shapes() -> Result:
    """All families of the installed transformers; and the weights that PEFT computes."""
    run = run_suite(
        "tests/integration/test_families_parameters.py", "tests/integration/test_experts_oracle.py"
    )
    counts = run.counts
    for reason, number in run.reasons.items():
        print(f"    {number} skipped: {reason}", flush=True)
    figure = f"{counts['passed']} passed, {counts['skipped']} skipped, {counts['failed']} failed"
    return Result(run.is_clean, figure)
