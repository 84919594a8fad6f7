"""Attention of one layer on a CPU: the backend ``cpp`` beside ``sdpa``, and beside memory.

Rounds take turns within one process; what is shown are the medians. Decode steps read K and V of
several layers in turn, as a model does, so that none of them finds its own in a cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from lorax_shard.attention import registry
from lorax_shard.attention.backend import AttentionBackend, AttentionSpec, StepMetadata
from lorax_shard.attention.kv_cache import KVShape, PagedCache

CPU = torch.device("cpu")
BLOCK_SIZE = 16
# Caches that decode steps read in turn hold so many bytes together, unless one layer has more.
MANY_BYTES = 192 << 20


class Step:
    """Rows of equal lengths over caches of several layers, with random K and V."""

    def __init__(
        self, backend: AttentionBackend, rows: int, new: int, context: int, heads: tuple[int, ...]
    ) -> None:
        num_heads, num_kv_heads, dim = heads
        width = -(-context // BLOCK_SIZE)
        self.layer_bytes = rows * context * num_kv_heads * dim * 8
        self.num_layers = max(1, min(32, MANY_BYTES // self.layer_bytes)) if new == 1 else 1
        cache = PagedCache(
            dict.fromkeys(range(self.num_layers), KVShape(num_kv_heads, dim, dim)),
            num_blocks=rows * width,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=CPU,
        )
        for pools in (cache.keys, cache.values):
            for pool in pools.values():
                pool.normal_()
        tables = torch.randperm(rows * width).view(rows, width)
        slots = torch.arange(rows * new)  # not written here
        decodes = rows if new == 1 else 0
        self._metadata = StepMetadata(
            [new] * rows, [context] * rows, slots, tables, decodes, cache, backend
        )
        self._query = torch.randn(rows * new, num_heads, dim)
        self._kv = torch.randn(2, rows * new, num_kv_heads, dim)
        self._spec = AttentionSpec(dim**-0.5)

    def run(self) -> None:
        """Compute all layers."""
        for layer in range(self.num_layers):
            key, value = self._kv
            self._metadata.backend.attend(
                self._query, key, value, layer, self._spec, self._metadata
            )


def in_turns(
    calls: list[Callable[[], None]], seconds: float, clock: Callable[[], float]
) -> list[float]:
    """Return the median time of each call, in seconds."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, found in zip(calls, times, strict=True):
            start = clock()
            call()
            found.append(clock() - start)
    return [statistics.median(found[1:]) for found in times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="*", default=["cpp", "sdpa"])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 1024, 4096])
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 512, 2048, 4000])
    parser.add_argument("--chunk", type=int, help="of each prompt, its last so many tokens only")
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], help="H, G and D")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    backends = [registry.create(name, CPU, torch.float32) for name in options.backends]
    cases = [(rows, 1, context) for rows in options.rows for context in options.contexts]
    cases += [(1, min(options.chunk or length, length), length) for length in options.prompts]
    print(
        "| rows x new tokens, context | "
        + " | ".join(options.backends)
        + " | ratio | GB/s, GFLOP/s |"
    )
    print("| --- | --- |" + " --- |" * (len(backends) + 1))
    with torch.inference_mode():
        for rows, new, context in cases:
            steps = [Step(each, rows, new, context, tuple(options.heads)) for each in backends]
            layers = steps[0].num_layers
            found = [
                each / layers for each in in_turns([s.run for s in steps], options.seconds, clock)
            ]
            pairs = rows * new * (context - (new - 1) / 2)
            flops = 4 * pairs * options.heads[0] * options.heads[2]
            print(
                f"| {rows} x {new}, {context} | "
                + " | ".join(f"{1e3 * each:.3f}" for each in found)
                + f" | {found[-1] / found[0]:.2f} | "
                + f"{steps[0].layer_bytes / found[0] / 1e9:.1f}, {flops / found[0] / 1e9:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
