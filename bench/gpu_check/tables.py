"""Decode and prompt steps of an 8B-shaped model, beside what memory and matrix units allow; draws.

Floors count each byte once (weights but the input embedding, KV read, the adapters in the step)
over the rate of reading, and each operation once over the rate of a large product, both measured
in the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from bench.gpu_check import preflight
from bench.gpu_check.compilations import CompiledSince
from bench.gpu_check.drawing import drawing_table, fastest
from bench.gpu_check.measure import Graphs, host_seconds, launches, seconds
from bench.gpu_check.models import (
    ATTENTION,
    BLOCK_SIZE,
    LLAMA_8B,
    TINY,
    LlamaShape,
    build,
    device_of,
    load_adapters,
)
from bench.gpu_check.preflight import Ceilings, PreflightSizes
from bench.gpu_check.report import Report
from bench.gpu_check.steps import ModelStep, attention_alone, products_alone

from lorax_shard.model.hf_model import HFPagedModel

RANKS = (8, 16, 32, 64)


class TableSizes(NamedTuple):
    """What the stage computes."""

    shape: LlamaShape
    dtype: torch.dtype
    # What matters most first: a stage that is cut keeps it.
    rows: tuple[int, ...]
    # How many adapters of ranks in turn.
    adapters: tuple[int, ...]
    # Rows, adapters and rank of the case that others publish.
    uniform: tuple[int, int, int]
    context: int
    # Rows and tokens of each, for prompts.
    prompts: tuple[tuple[int, int], ...]
    # Rows that are drawn.
    drawn: tuple[int, ...]
    preflight: PreflightSizes


FULL = TableSizes(
    LLAMA_8B, torch.bfloat16, (64, 1, 256, 8), (0, 1, 32, 128), (64, 32, 16), 512,
    ((1, 512), (1, 2048), (4, 2048), (16, 512)), (1, 8, 64, 256), preflight.FULL,
)  # fmt: skip
SMALL = TableSizes(
    TINY, torch.float32, (2,), (0, 2), (2, 2, 4), 20, ((1, 6), (2, 4)), (2,), preflight.SMALL
)
_COLUMNS = (
    "rows", "adapters", "eager", "graph", "products alone", "attention alone", "added by adapters",
    "their floor", "added / floor", "floor", "share of the floor, %", "tokens/s", "host", "launches",
)  # fmt: skip


class AdapterSet(NamedTuple):
    """Adapters that a step's rows take in turn."""

    label: str
    # Bytes by slot.
    nbytes: dict[int, int]


NO_ADAPTERS = AdapterSet("0", {})


def run(report: Report, *, small: bool) -> None:
    """Fill the tables."""
    sizes, device = SMALL if small else FULL, device_of(small)
    ceilings = preflight.measure(sizes.preflight, device)
    # On a GPU the backends of choice; here the same kernels in the interpreter.
    choice = "triton" if small else "auto"
    model = build(sizes.shape, sizes.dtype, device, lora=choice, attention=choice)
    draws = fastest(device)
    compiled = CompiledSince()
    in_turn, uniform = load_sets(model, sizes)
    report.note(
        f"{model.weight_bytes / 1e9:.3g} GB of weights; attention {model.attention_backend}, "
        f"LoRA {model.lora_backend}, linears {model.linear_backend}; adapters of ranks "
        f"{', '.join(map(str, RANKS))} in turn; reading {ceilings.read_bytes_s / 1e9:.0f} GB/s, "
        f"multiplying {ceilings.flops / 1e12:.0f} TFLOP/s"
    )
    table = DecodeTable(report, sizes, ceilings, model)
    for rows in sizes.rows:
        sets = [in_turn[count] for count in sizes.adapters if count <= rows]
        table.fill(rows, [*sets, *(uniform if rows == sizes.uniform[0] else ())])
    model.free_cache()
    prompt_table(report, sizes, ceilings, model, in_turn)
    drawing_table(report, draws, sizes.drawn, sizes.shape.vocab, device)
    compiled.note(report)


def load_sets(
    model: HFPagedModel, sizes: TableSizes
) -> tuple[dict[int, AdapterSet], list[AdapterSet]]:
    """Load all adapters; return the sets of ranks in turn by their number, and those of one rank."""
    most = max(sizes.adapters)
    loaded = load_adapters(model, [RANKS[number % len(RANKS)] for number in range(most)])
    in_turn = {
        count: AdapterSet(str(count), dict(list(loaded.items())[:count]))
        for count in sizes.adapters
    }
    _, count, rank = sizes.uniform
    uniform = []
    for where, modules in (("all linears", ()), ("attention's", ATTENTION)):
        first = most + len(uniform) * count
        found = load_adapters(model, [rank] * count, modules=modules, first_slot=first)
        uniform.append(AdapterSet(f"{count} of rank {rank}, {where}", found))
    return in_turn, uniform


class DecodeTable:
    """The table of decode steps, a line for each number of rows and set of adapters."""

    def __init__(
        self, report: Report, sizes: TableSizes, ceilings: Ceilings, model: HFPagedModel
    ) -> None:
        self._report, self._sizes, self._ceilings = report, sizes, ceilings
        self._model, self._graphs = model, Graphs(report, model.device)
        report.table(f"Decode step, {sizes.context} tokens of context, ms", _COLUMNS)

    def fill(self, rows: int, sets: Sequence[AdapterSet]) -> None:
        """Add the lines of so many rows; the first set is empty."""
        sizes, model, device = self._sizes, self._model, self._model.device
        model.allocate_cache(rows * -(-sizes.context // BLOCK_SIZE), BLOCK_SIZE)
        kv_bytes = rows * sizes.context * sizes.shape.kv_bytes(sizes.dtype)
        embedding = sizes.shape.head_params * sizes.dtype.itemsize
        base_floor = (model.weight_bytes - embedding + kv_bytes) / self._ceilings.read_bytes_s
        without = 0.0
        for adapters in sets:
            step = ModelStep(model, rows, 1, sizes.context, list(adapters.nbytes))
            eager = seconds(step.eager, device)
            replay = step.graph()
            graph, host = None, None
            if replay is not None:
                assert model.graphs is not None
                graph = seconds(replay, device)
                host = host_seconds(partial(model.graphs.run, step.numbers()), device)
            best = graph or eager
            alone: tuple[float | None, float | None] = (None, None)
            if not adapters.nbytes:
                without = best
                alone = (
                    self._graphs.seconds(products_alone(step)),
                    self._graphs.seconds(attention_alone(step)),
                )
            added_floor = sum(adapters.nbytes.values()) / self._ceilings.read_bytes_s
            added = best - without if adapters.nbytes else None
            floor = base_floor + added_floor
            self._report.row(
                rows, adapters.label, eager * 1e3, _ms(graph), *map(_ms, alone), _ms(added),
                added_floor * 1e3 if adapters.nbytes else None,
                None if added is None else added / added_floor,
                floor * 1e3, 100 * floor / best, rows / best, _ms(host),
                # As many whatever the adapters are.
                launches(step.eager, device).num if len(adapters.nbytes) <= 1 else None,
            )  # fmt: skip


def _ms(value: float | None) -> float | None:
    return None if value is None else value * 1e3


def prompt_table(
    report: Report,
    sizes: TableSizes,
    ceilings: Ceilings,
    model: HFPagedModel,
    sets: dict[int, AdapterSet],
) -> None:
    """Fill the table of prompts."""
    report.table(
        "Prompts in one step",
        ("rows", "tokens each", "adapters", "ms", "tokens/s", "floor, ms", "share of the floor, %"),
    )
    shape, slots = sizes.shape, list(sets[max(sets)].nbytes)
    for rows, tokens in sizes.prompts:
        model.allocate_cache(rows * -(-tokens // BLOCK_SIZE), BLOCK_SIZE)
        # Causal: each token attends to half of its row on average.
        attended = 2 * 2 * shape.layers * shape.heads * shape.head_dim * rows * tokens**2 / 2
        flops = 2 * shape.linear_params * rows * tokens + 2 * shape.head_params * rows + attended
        floor = flops / ceilings.flops
        for adapters in sorted({0, 1, min(rows, len(slots))}):
            step = ModelStep(model, rows, tokens, tokens, slots[:adapters])
            took = seconds(step.eager, model.device, most=10)
            report.row(rows, tokens, adapters, took * 1e3, rows * tokens / took, floor * 1e3,
                       100 * floor / took)  # fmt: skip
    model.free_cache()
