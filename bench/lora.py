"""Milliseconds that adapters add to a decode step, next to the floor: their bytes over bandwidth.

The default model, every linear of every block adapted. Steps with and without adapters and
the reading of memory alternate, and the best of each count, so that what other programs do
meanwhile hardly shows. On a machine that others keep busy, ``--one-thread`` counts the
processor time of one thread instead of the wall's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.helpers.default_model import default_model_dir

from lorax_contract.config import ShardConfig
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.model import LoraModel
from lorax_shard.lora.sites import Kind
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model

ROWS = (1, 8, 32)
ADAPTERS = (1, 8, 32)
RANKS = (8, 16)
CONTEXT = 100
BLOCK_SIZE = 16


class Case(NamedTuple):
    """One line of the table, in milliseconds."""

    rows: int
    adapters: int
    rank: int
    base_ms: float
    added_ms: float
    floor_ms: float


def make_adapter(lora: LoraModel, rank: int, seed: int) -> HostAdapter:
    """Return a random adapter of all linears but the head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.01

    modules = {
        name: ModuleDelta(a=draw(rank, site.in_features), b=draw(site.out_features, rank))
        for name, site in lora.sites.items()
        if site.kind is Kind.LINEAR and not site.is_head
    }
    return HostAdapter(digest=f"random-{seed}", modules=modules)


class Decode:
    """A decode step of N rows that can be repeated."""

    def __init__(self, model: HFPagedModel, lora: LoraModel, num_rows: int) -> None:
        blocks = -(-CONTEXT // BLOCK_SIZE)
        tables = torch.arange(num_rows * blocks).view(num_rows, blocks)
        self.model, self.lora, self.num_rows = model, lora, num_rows
        self.ids = torch.arange(num_rows) * 31 + 100
        self.positions = torch.full((num_rows,), CONTEXT - 1)
        self.slots = tables[:, -1] * BLOCK_SIZE + (CONTEXT - 1) % BLOCK_SIZE
        self.tables = tables

    def run(self, num_adapters: int) -> None:
        """Compute the step with ``num_adapters`` distinct adapters; 0: none."""
        metadata = self.model.make_metadata(
            [1] * self.num_rows, [CONTEXT] * self.num_rows, self.slots, self.tables, self.num_rows
        )
        rows = torch.arange(self.num_rows)
        adapters = [row % num_adapters if num_adapters else None for row in range(self.num_rows)]
        with self.lora.step([1] * self.num_rows, adapters, rows):
            self.model.forward(self.ids, self.positions, metadata, rows)


class Bench:
    """Takes measurements in turns, with one clock."""

    def __init__(self, clock: Callable[[], float], rounds: int) -> None:
        self.clock, self.rounds = clock, rounds
        self.data = torch.ones(1 << 25)

    def best(self, *calls: Callable[[], Any]) -> list[float]:
        """Return the best seconds of each call, after one round to warm up."""
        best = [float("inf")] * len(calls)
        for number in range(self.rounds + 1):
            for index, call in enumerate(calls):
                start = self.clock()
                call()
                if number:
                    best[index] = min(best[index], self.clock() - start)
        return best

    def measure(self, decode: Decode, num_adapters: int, rank: int, adapter_bytes: int) -> Case:
        """Return one line of the table; the adapters are of one size."""
        without, adapted, reading = self.best(
            lambda: decode.run(0), lambda: decode.run(num_adapters), self.data.sum
        )
        return Case(
            decode.num_rows,
            num_adapters,
            rank,
            without * 1e3,
            (adapted - without) * 1e3,
            num_adapters * adapter_bytes * reading / self.data.nbytes * 1e3,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", help="a LoRA backend")
    parser.add_argument("--linear", default="auto", help="a linear backend")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--one-thread", action="store_true", help="count processor time")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--adapters", type=int, nargs="+", default=ADAPTERS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.one_thread:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.one_thread else time.perf_counter
    bench = Bench(clock, arguments.rounds)
    config = ShardConfig(
        model_dir=str(default_model_dir()), model_id="bench", shard_uris=["unix:/unused"],
        linear_backend=arguments.linear, lora_backend=arguments.backend,
    )  # fmt: skip
    model = load_paged_model(config)
    lora = model.lora
    assert lora is not None
    model.allocate_cache(max(arguments.rows) * -(-CONTEXT // BLOCK_SIZE), BLOCK_SIZE)
    print(f"LoRA backend {lora.backend}, linears {model.linear_backend}")
    print("| rows | adapters | rank | step without, ms | added, ms | floor, ms | added / floor |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    cases = []
    for rank in RANKS:
        for slot in range(max(arguments.adapters)):
            prepared = lora.prepare(make_adapter(lora, rank, slot))
            lora.load(slot, prepared)
        for rows in arguments.rows:
            decode = Decode(model, lora, rows)
            for adapters in (each for each in arguments.adapters if each <= rows):
                case = bench.measure(decode, adapters, rank, prepared.nbytes)
                cases.append(case)
                values = (*case, case.added_ms / case.floor_ms)
                print("| " + " | ".join(f"{value:.3g}" for value in values) + " |", flush=True)
        for slot in range(max(arguments.adapters)):
            lora.unload(slot)
    if arguments.json:
        arguments.json.write_text(json.dumps([case._asdict() for case in cases]) + "\n")


if __name__ == "__main__":
    main()
