"""Milliseconds of all linears of one step, by backend and row count.

    python bench/linears.py [--model-dir FOLDER] [--threads N] [--rounds N] [--rows N ...]
                            [--backends NAME ...] [--one-thread]

Every backend gets its own copy of a Llama-shaped model. Backends take turns within each round
of one run; a figure is the sum of each linear's best call, so that ratios hold on a machine
that runs other programs too. With ``--one-thread`` it is processor time of one thread, which such
a machine changes least. The head is timed apart: it runs on sampled rows only.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lorax_contract.cache import default_cache_dir
from lorax_shard.linear import install
from lorax_shard.prepare.prepare import prepare

ROWS = (1, 4, 8, 12, 16, 24, 32, 48, 64, 128, 512)
# "onednn, apart" computes every linear by itself: it shows what stacking siblings is worth.
BACKENDS = ("torch", "panel", "tiles", "onednn", "onednn, apart", "mkl", "auto")
Clock = Callable[[], float]
HEADS = ("torch", "panel", "tiles", "onednn", "mkl")


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--one-thread", action="store_true")
    options = parser.parse_args()
    threads = 1 if options.one_thread else options.threads
    clock = time.thread_time if options.one_thread else time.perf_counter
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    transformers_logging.disable_progress_bar()
    folder = options.model_dir or default_model()
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    models = {name: copy.deepcopy(stock) for name in options.backends}
    chosen = {name: put_in(model, name) for name, model in models.items()}
    print(f"{cpu_name()}, {threads} threads, torch {torch.__version__}, {folder.name}")
    if "auto" in chosen:
        print(f"auto is: {chosen['auto']}\n")
    head_models = {name: model for name, model in models.items() if name in HEADS}
    titles = ["rows", "stock", *options.backends, *(f"head: {name}" for name in head_models)]
    print("| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")
    for rows in options.rows:
        figures = measure({"stock": stock, **models}, rows, options.rounds, clock)
        figures += measure_heads(head_models, rows, options.rounds, clock)
        print(f"| {rows} | " + " | ".join(f"{each:.1f}" for each in figures) + " |", flush=True)


def put_in(model: Any, name: str) -> str:
    """Install a backend and return what was chosen."""
    backend, _, apart = name.partition(", ")
    return install(model, backend, torch.device("cpu"), stack_siblings=not apart).backend


def default_model() -> Path:
    """Return the embedded model's folder."""
    return prepare(
        None,
        revision=None,
        source="hub",
        cache_dir=default_cache_dir(),
        trust_remote_code=False,
        progress=lambda event: None,
    ).model_dir


def cpu_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def measure(models: dict[str, Any], rows: int, rounds: int, clock: Clock) -> list[float]:
    """Return each model's milliseconds for all layers' linears: the sum of each call's best."""
    best: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, model in models.items():
            times = list(call_layers(model, rows, clock))
            best[name] = [min(pair) for pair in zip(best.get(name, times), times, strict=True)]
    return [sum(times) * 1e3 for times in best.values()]


def call_layers(model: Any, rows: int, clock: Clock) -> Iterator[float]:
    """Call every layer's linears in the order of a forward pass; yields seconds of each call."""
    first = model.model.layers[0]
    wide = torch.randn(rows, first.self_attn.o_proj.in_features)
    inner = torch.randn(rows, first.mlp.down_proj.in_features)
    for layer in model.model.layers:
        # New tensor objects for each layer, as in the model: siblings share one.
        attention_input, mlp_input = wide[:], wide[:]
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            yield seconds(linear, attention_input, clock)
        yield seconds(attention.o_proj, wide, clock)
        yield seconds(mlp.gate_proj, mlp_input, clock)
        yield seconds(mlp.up_proj, mlp_input, clock)
        yield seconds(mlp.down_proj, inner, clock)


def measure_heads(models: dict[str, Any], rows: int, rounds: int, clock: Clock) -> list[float]:
    """Return the best milliseconds of each model's head, taking turns."""
    best = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, model in models.items():
            x = torch.randn(rows, model.lm_head.in_features)
            best[name] = min(best[name], seconds(model.lm_head, x, clock))
    return [each * 1e3 for each in best.values()]


def seconds(linear: Any, x: torch.Tensor, clock: Clock) -> float:
    """Time one call."""
    start = clock()
    linear(x)
    return clock() - start


if __name__ == "__main__":
    main()
