"""Milliseconds that adapters add to a decode step, next to the floor: their bytes over bandwidth.

The default model as a shard computes it, every linear of every block adapted. Steps with and
without adapters and the reading of memory take turns; what is told is the median of the rounds,
and the quarter of them below and above. On a machine that others keep busy, ``--one-thread``
counts the processor time of one thread instead of the wall's, and ``--best`` tells the least.

``--many`` fills so many slots, and draws the adapters of each step from all of them, beside steps
that have the same few each time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tests.helpers.default_model import default_model_dir

from lorax_contract.config import ShardConfig
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.model import LoraModel
from lorax_shard.lora.sites import Kind
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.interface import GraphSettings, PassNumbers
from lorax_shard.model.launch import launched
from lorax_shard.model.loader import load_paged_model

# Rows of a step, and distinct adapters among them.
CASES = ((1, 1), (8, 1), (8, 8), (32, 8), (32, 32), (64, 64))
RANK = 8
CONTEXT = 100
BLOCK_SIZE = 16
# Adapters in memory at most where many slots are filled: more than any cache holds.
MOST_IN_MEMORY = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_adapter(lora: LoraModel, rank: int, seed: int, dtype: torch.dtype) -> HostAdapter:
    """Return a random adapter of all linears but the head, as a file of this type has it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.01).to(dtype)

    modules = {
        name: ModuleDelta(a=draw(rank, site.in_features), b=draw(site.out_features, rank))
        for name, site in lora.sites.items()
        if site.kind is Kind.LINEAR and not site.is_head
    }
    return HostAdapter(digest=f"random-{seed}", modules=modules)


def load_model(
    max_rows: int, max_slots: int, linear: str = "auto", lora: str = "auto", folder: str = ""
) -> HFPagedModel:
    """Load a model as a shard does, the default one or that of a folder, with room for rows and slots."""
    config = ShardConfig(
        model_dir=folder or str(default_model_dir()), model_id="bench", shard_uris=["unix:/unused"],
        linear_backend=linear, lora_backend=lora,
    )  # fmt: skip
    model = load_paged_model(config)
    model.allocate_cache(max_rows * -(-CONTEXT // BLOCK_SIZE) + 64, BLOCK_SIZE)
    model.capture_graphs(
        GraphSettings(max_rows=max_rows, max_context=512, max_rank=64, max_slots=max_slots)
    )
    return model


class Decode:
    """A decode step of some rows that can be repeated."""

    def __init__(self, model: HFPagedModel, num_rows: int) -> None:
        blocks = -(-CONTEXT // BLOCK_SIZE)
        tables = np.arange(num_rows * blocks, dtype=np.int64).reshape(num_rows, blocks)
        self._model, self.num_rows = model, num_rows
        rows = np.arange(num_rows, dtype=np.int64)
        self._numbers = PassNumbers(
            input_ids=rows * 31 + 100,
            positions=np.full(num_rows, CONTEXT - 1, dtype=np.int64),
            kv_slots=tables[:, -1] * BLOCK_SIZE + (CONTEXT - 1) % BLOCK_SIZE,
            tables=tables,
            query_lens=[1] * num_rows,
            context_lens=[CONTEXT] * num_rows,
            num_decode_rows=num_rows,
            logit_rows=rows,
            slots=[None] * num_rows,
            slot_lens=[1] * num_rows,
        )

    @torch.inference_mode()
    def run(self, slots: list[int] | None = None) -> None:
        """Compute the step; row i has the adapter of slot ``slots[i % len(slots)]``."""
        numbers = self._numbers
        if slots:
            of_row = [slots[row % len(slots)] for row in range(self.num_rows)]
            numbers = numbers._replace(slots=of_row)
        graphs = self._model.graphs
        if graphs is None or graphs.run(numbers) is None:
            launched(self._model, numbers)


class Turns:
    """Takes measurements in turns, with one clock."""

    def __init__(self, clock: Callable[[], float], rounds: int) -> None:
        self._clock, self._rounds = clock, rounds
        self.data = torch.ones(1 << 25)

    def take(self, *calls: Callable[[], Any]) -> list[list[float]]:
        """Return the milliseconds of each call in each round, after one to warm up."""
        taken: list[list[float]] = [[] for _ in calls]
        for number in range(self._rounds + 1):
            for call, of_call in zip(calls, taken, strict=True):
                start = self._clock()
                call()
                if number:
                    of_call.append((self._clock() - start) * 1e3)
        return taken

    def floor(self, reading_ms: float, num_bytes: int) -> float:
        """Return the milliseconds of reading so many bytes."""
        return num_bytes * reading_ms / self.data.nbytes


class AddedByAdapters(NamedTuple):
    """One line of the table: milliseconds, gigabytes a second, and what is left of the speed."""

    dtype: str
    rows: int
    adapters: int
    rank: int
    step_ms: float
    added_ms: float
    added_low_ms: float
    added_high_ms: float
    floor_ms: float
    bandwidth: float
    ratio: float
    retention: float
    asked: float


class AdaptersOfStep(NamedTuple):
    """What adapters of a step have in common, and the bytes of theirs that it reads."""

    dtype: torch.dtype
    rank: int
    num_bytes: int


def figures(
    turns: Turns, decode: Decode, slots: list[int], asked: AdaptersOfStep, *, best: bool = False
) -> AddedByAdapters:
    """Measure one case. Both kinds of step find of the caches what is left by the same reading."""
    read = turns.data.sum
    first, without, again, adapted = turns.take(read, decode.run, read, lambda: decode.run(slots))
    reading = first + again
    told: Callable[[list[float]], float] = min if best else statistics.median
    differences = [one - other for one, other in zip(adapted, without, strict=True)]
    low, middle, high = statistics.quantiles(differences, n=4)
    step = told(without)
    added = told(adapted) - step if best else middle
    floor = turns.floor(told(reading), asked.num_bytes)
    return AddedByAdapters(
        dtype=str(asked.dtype).removeprefix("torch."),
        rows=decode.num_rows,
        adapters=len(slots),
        rank=asked.rank,
        step_ms=step,
        added_ms=added,
        added_low_ms=low,
        added_high_ms=high,
        floor_ms=floor,
        bandwidth=turns.data.nbytes / told(reading) / 1e6,
        ratio=added / floor,
        retention=step / (step + added),
        asked=0.95 * step / (step + 1.5 * floor),
    )


def many(turns: Turns, model: HFPagedModel, num_slots: int, rank: int, dtype: torch.dtype) -> float:
    """Return the speed of steps of 8 adapters drawn from all slots, by that of the same 8 slots."""
    lora = model.lora
    assert lora is not None
    prepared = [
        lora.prepare(make_adapter(lora, rank, seed, dtype))
        for seed in range(min(num_slots, MOST_IN_MEMORY))
    ]
    for slot in range(num_slots):
        lora.load(slot, prepared[slot % len(prepared)])
    decode, draw = Decode(model, 8), random.Random(0)
    few, drawn = turns.take(
        partial(decode.run, list(range(8))),
        lambda: decode.run(draw.sample(range(num_slots), 8)),
    )
    for slot in range(num_slots):
        lora.unload(slot)
    return statistics.median(few) / statistics.median(drawn)


def main() -> None:
    """Print the table."""
    arguments = _arguments()
    if arguments.one_thread:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.one_thread else time.perf_counter
    turns = Turns(clock, arguments.rounds)
    cases = [tuple(map(int, case.split("x"))) for case in arguments.cases]
    num_slots = max(arguments.many, *(adapters for _, adapters in cases))
    most_rows = max(8, *(rows for rows, _ in cases))
    model = load_model(most_rows, num_slots, arguments.linear, arguments.backend)
    lora = model.lora
    assert lora is not None
    print(f"LoRA backend {lora.backend}, linears {model.linear_backend}")
    show_head()
    found: list[AddedByAdapters] = []
    for name in arguments.stored_dtype:
        for rank in arguments.ranks:
            for slot in range(max(adapters for _, adapters in cases)):
                prepared = lora.prepare(make_adapter(lora, rank, slot, DTYPES[name]))
                lora.load(slot, prepared)
            for rows, adapters in cases:
                decode, slots = Decode(model, rows), list(range(adapters))
                asked = AdaptersOfStep(DTYPES[name], rank, adapters * prepared.nbytes)
                line = figures(turns, decode, slots, asked, best=arguments.best)
                found.append(line)
                show(line)
            for slot in list(lora.slots):
                lora.unload(slot)
    document: dict[str, Any] = {"cases": [each._asdict() for each in found]}
    if arguments.many:
        dtype = DTYPES[arguments.stored_dtype[-1]]
        document["many"] = many(turns, model, arguments.many, arguments.ranks[0], dtype)
        print(f"8 of {arguments.many} adapters, drawn for each step: {document['many']:.3f} of 8")
    if arguments.json:
        arguments.json.write_text(json.dumps(document) + "\n")


def show_head() -> None:
    """Print the first lines of the table."""
    print(
        "| type | rows | adapters | rank | step, ms | added, ms | low | high | floor, ms | GB/s "
        "| added / floor | retention | asked |"
    )
    print("| --- " * len(AddedByAdapters._fields) + "|")


def show(line: AddedByAdapters) -> None:
    """Print a line of the table."""
    shown = (f"{each:.3g}" if isinstance(each, float) else str(each) for each in line)
    print("| " + " | ".join(shown) + " |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto", help="a LoRA backend")
    parser.add_argument("--linear", default="auto", help="a linear backend")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--one-thread", action="store_true", help="count processor time")
    parser.add_argument("--best", action="store_true", help="tell the least, not the median")
    parser.add_argument(
        "--cases", nargs="+", default=[f"{rows}x{adapters}" for rows, adapters in CASES],
        help="rows x distinct adapters",
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, nargs="+", default=[RANK])
    parser.add_argument(
        "--stored-dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"],
        help="the types of adapters' files",
    )  # fmt: skip
    parser.add_argument("--many", type=int, default=0, help="slots that steps are drawn from")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
