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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tests.helpers.default_model import default_model_dir
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorax_contract.config import ShardConfig
from lorax_shard.attention.cpp import CppAttention
from lorax_shard.attention.sdpa import SdpaAttention
from lorax_shard.fused import install
from lorax_shard.fused.backend import GateFunction, RmsNorm, Rotation
from lorax_shard.fused.cpp import CppElementwise
from lorax_shard.linear import PackedLinear
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


class Part(NamedTuple):
    """One kind of work of a step: how often, by the model's own code, and by a kernel."""

    count: int
    own: Callable[[], Any]
    kernel: Callable[[], Any] | None


def parts_of(model: HFPagedModel, rows: int) -> dict[str, Part]:
    """Return the parts of a step of so many tokens, on inputs that lie as in the model."""
    llama: Any = model._model.model
    layer, layers = llama.layers[0], len(llama.layers)
    config, backend = model._model.config, CppElementwise()
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x, other = torch.randn(2, 1, rows, config.hidden_size)
    stacked = torch.randn(1, rows, (heads + 2 * kv_heads) * dim).view(1, rows, -1, dim)
    query, key, value = stacked.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    gate, up = torch.randn(1, rows, 2 * config.intermediate_size).chunk(2, dim=-1)
    cos, sin = torch.randn(2, 1, rows, dim)
    k, v = (each[0].transpose(0, 1) for each in (key, value))
    slots = torch.arange(rows)
    step = model.make_metadata([1] * rows, [1] * rows, slots, slots[:, None], rows)
    linears = [each for each in model._model.modules() if isinstance(each, PackedLinear)]
    inputs = {each.in_features: torch.randn(1, rows, each.in_features) for each in linears}
    norm, plain = RmsNorm(config.rms_norm_eps, 0.0), Rotation(False, False)
    silu, weight, mlp = GateFunction.SILU, layer.input_layernorm.weight, layer.mlp

    def compute(of_step: Sequence[PackedLinear]) -> None:
        for each in of_step:
            each(inputs[each.in_features])

    return {
        "linears": Part(1, lambda: compute(linears[:-1]), None),
        "head": Part(1, lambda: compute(linears[-1:]), None),
        "norm": Part(
            2 * layers + 1,
            lambda: layer.input_layernorm(x),
            lambda: backend.rms_norm(x, weight, norm),
        ),
        "rotation": Part(
            layers,
            lambda: apply_rotary_pos_emb(query, key, cos, sin),
            lambda: backend.rotate(query, key, cos, sin, plain),
        ),
        "gate": Part(layers, lambda: mlp.act_fn(gate) * up, lambda: backend.gated(gate, up, silu)),
        "storing K and V": Part(
            layers,
            lambda: SdpaAttention.store(CppAttention(), k, v, 0, step),
            lambda: CppAttention().store(k, v, 0, step),
        ),
        "residual": Part(2 * layers, lambda: x + other, None),
    }


@torch.inference_mode()
def print_parts(model: HFPagedModel, clock: Callable[[], float], rounds: int) -> None:
    print("| tokens | part | times | own, ms | kernel, ms |")
    for rows in (1, 8, 32, 512):
        calls = 3 if rows == 512 else 50
        for name, part in parts_of(model, rows).items():
            best = [float("inf")] * 2
            for _ in range(rounds):
                for index, call in enumerate((part.own, part.kernel)):
                    if call is not None:
                        repeat = calls if part.count > 1 else 1
                        spent = measure(repeated(call, repeat), clock, 3) / repeat
                        best[index] = min(best[index], spent * part.count)
            kernel = f"{best[1]:.2f}" if part.kernel else ""
            print(f"| {rows} | {name} | {part.count} | {best[0]:.2f} | {kernel} |", flush=True)


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """Return a call of many calls: one of some microseconds is too short for a clock."""

    def run() -> None:
        for _ in range(times):
            call()

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
    print_parts(model, clock, arguments.rounds)
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
