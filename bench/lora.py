"""Milliseconds that adapters add to a decode step, next to the floor: their bytes over bandwidth.

The default model, every linear of every block adapted. Steps with and without adapters
alternate, and the best of each count, so that what other programs do meanwhile hardly shows.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tests.helpers.default_model import default_model_dir

from lorax_contract.config import ShardConfig
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.model import LoraModel, install
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

    def run(self, num_adapters: int) -> float:
        """Compute the step with ``num_adapters`` distinct adapters (0: none); return seconds."""
        metadata = self.model.make_metadata(
            [1] * self.num_rows, [CONTEXT] * self.num_rows, self.slots, self.tables, self.num_rows
        )
        rows = torch.arange(self.num_rows)
        adapters = [row % num_adapters if num_adapters else None for row in range(self.num_rows)]
        start = time.perf_counter()
        with self.lora.step([1] * self.num_rows, adapters, rows):
            self.model.forward(self.ids, self.positions, metadata, rows)
        return time.perf_counter() - start


def bandwidth() -> float:
    """Return bytes per second of reading memory."""
    data = torch.ones(1 << 26)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def measure(decode: Decode, num_adapters: int, steps: int) -> tuple[float, float]:
    """Return the best seconds of a step without adapters, and what adapters add to it."""
    decode.run(0), decode.run(num_adapters)
    pairs = [(decode.run(0), decode.run(num_adapters)) for _ in range(steps)]
    without, adapted = (min(seconds) for seconds in zip(*pairs))
    return without, adapted - without


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", help="a LoRA backend")
    parser.add_argument("--linear", default="auto", help="a linear backend")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = ShardConfig(
        model_dir=str(default_model_dir()), model_id="bench", shard_uris=["unix:/unused"],
        linear_backend=arguments.linear,
    )  # fmt: skip
    model = load_paged_model(config)
    lora = install(model._model, arguments.backend, model.device, model.dtype)
    model.allocate_cache(max(ROWS) * -(-CONTEXT // BLOCK_SIZE), BLOCK_SIZE)
    rate = bandwidth()
    print(f"LoRA backend {lora.backend}, linears {model.linear_backend}, {rate / 1e9:.1f} GB/s")
    print("| rows | adapters | rank | step without, ms | added, ms | floor, ms | added / floor |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    cases = []
    for rank in RANKS:
        for slot in range(max(ADAPTERS)):
            lora.load(slot, make_adapter(lora, rank, slot))
        for rows in ROWS:
            decode = Decode(model, lora, rows)
            for adapters in (each for each in ADAPTERS if each <= rows):
                base_s, added_s = measure(decode, adapters, arguments.steps)
                floor_s = sum(lora.slot_bytes(slot) for slot in range(adapters)) / rate
                case = Case(rows, adapters, rank, base_s * 1e3, added_s * 1e3, floor_s * 1e3)
                cases.append(case)
                values = (*case, case.added_ms / case.floor_ms)
                print("| " + " | ".join(f"{value:.3g}" for value in values) + " |", flush=True)
        for slot in range(max(ADAPTERS)):
            lora.unload(slot)
    if arguments.json:
        arguments.json.write_text(json.dumps([case._asdict() for case in cases]) + "\n")


if __name__ == "__main__":
    main()
