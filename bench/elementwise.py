"""What fused elementwise work takes off a step of the embedded default model on a CPU.

A step's forward pass is measured with the model's own code and torch's way of storing K and V
(``own``), with the kernel that stores them (``store``), and with norms, gates and rotations by
kernels too (``fused``), in turns within one run; then each operation by itself. Figures are the best
of all rounds, so that what other programs do meanwhile hardly shows; with ``--threads 1`` they
are the processor time of that thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tests.helpers.default_model import default_model_dir

from lorax_contract.config import ShardConfig
from lorax_shard.attention.cpp import CppAttention
from lorax_shard.attention.sdpa import SdpaAttention
from lorax_shard.fused import install
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model

# Rows, and tokens that each of them computes.
STEPS = ((1, 1), (8, 1), (32, 1), (1, 512))
CONTEXT = 100
BLOCK_SIZE = 16
VARIANTS = ("own", "store", "fused")


def make_step(model: HFPagedModel, rows: int, tokens: int) -> Callable[[], Any]:
    """Return a forward pass that can be repeated: the last tokens of each row's context."""
    context = max(CONTEXT, tokens)
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.arange(rows * blocks).view(rows, blocks)
    position = torch.arange(context - tokens, context)
    slots = (tables[:, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE).flatten()
    ids = torch.arange(rows * tokens) * 31 % 40_000 + 100
    last = torch.arange(1, rows + 1) * tokens - 1

    def run() -> Any:
        metadata = model.make_metadata(
            [tokens] * rows, [context] * rows, slots, tables, rows if tokens == 1 else 0
        )
        return model.forward(ids, position.repeat(rows), metadata, last)

    return run


@contextmanager
def variant(model: HFPagedModel, name: str) -> Iterator[None]:
    """Within, the model computes as a variant does."""
    store = CppAttention.store
    if name == "own":
        CppAttention.store = SdpaAttention.store  # type: ignore[method-assign]
    backend = "cpp" if name == "fused" else "torch"
    fused = install(model._model, backend, torch.device("cpu"), torch.float32)
    try:
        yield
    finally:
        CppAttention.store = store  # type: ignore[method-assign]
        fused.undo()


def measure(run: Callable[[], Any], clock: Callable[[], float], times: int) -> float:
    """Return the milliseconds of the best of some calls after one to warm up."""
    run()
    best = float("inf")
    for _ in range(times):
        start = clock()
        run()
        best = min(best, clock() - start)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    model = load_paged_model(
        ShardConfig(
            model_dir=str(default_model_dir()), model_id="bench", shard_uris=["unix:/unused"],
            attention_backend="cpp", elementwise_backend="torch",
        )
    )  # fmt: skip
    model.allocate_cache(STEPS[2][0] * -(-CONTEXT // BLOCK_SIZE) + 32, BLOCK_SIZE)
    found: dict[tuple[tuple[int, int], str], list[float]] = {}
    for number in range(arguments.rounds):
        # Each round in another order.
        for name in VARIANTS[number % 3 :] + VARIANTS[: number % 3]:
            with variant(model, name):
                for step in STEPS:
                    times = 2 if step[1] > 1 else 5
                    milliseconds = measure(make_step(model, *step), clock, times)
                    found.setdefault((step, name), []).append(milliseconds)
    print(f"{arguments.threads} threads, {arguments.rounds} rounds, linears {model.linear_backend}")
    print("| rows x tokens | own | store | fused | fused / own, by round |")
    for step in STEPS:
        columns = [found[step, name] for name in VARIANTS]
        ratios = [fused / own for own, fused in zip(columns[0], columns[2], strict=True)]
        best = " | ".join(f"{min(column):.2f}" for column in columns)
        print(
            f"| {step[0]} x {step[1]} | {best} | median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) |"
        )


if __name__ == "__main__":
    main()
