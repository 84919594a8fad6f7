"""Decode and prompt steps of an 8B-shaped model, beside what memory and matrix units allow.

Floors count each byte once (weights but the input embedding, KV read, the adapters in the step)
over the bandwidth of a large copy, and each operation once over the rate of a large product, both
measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

import torch
from bench.gpu_check.models import (
    BLOCK_SIZE,
    LLAMA_8B,
    TINY,
    LlamaShape,
    build,
    device_of,
    load_adapters,
    seconds,
)
from bench.gpu_check.report import Report

from lorax_shard.model.hf_model import HFPagedModel

RANKS = (8, 16, 32, 64)


class TableSizes(NamedTuple):
    """What the stage computes."""

    shape: LlamaShape
    dtype: torch.dtype
    rows: tuple[int, ...]
    adapters: tuple[int, ...]
    context: int
    # Rows and tokens of each, for prompts.
    prompts: tuple[tuple[int, int], ...]
    copy_bytes: int
    matrix: int


FULL = TableSizes(
    LLAMA_8B, torch.bfloat16, (1, 8, 32, 64, 128, 256), (0, 1, 8, 32, 128), 512,
    ((1, 512), (1, 2048), (4, 2048), (16, 512)), 1 << 32, 8192,
)  # fmt: skip
SMALL = TableSizes(TINY, torch.float32, (2,), (0, 2), 20, ((1, 6), (2, 4)), 1 << 22, 256)


class Rates(NamedTuple):
    """The machine's ceilings."""

    bytes_s: float
    flops: float


class Measured(NamedTuple):
    """One kind of step without its adapters, for what they add."""

    eager_s: float
    graph_s: float | None


def run(report: Report, *, small: bool) -> None:
    """Fill the tables."""
    sizes, device = SMALL if small else FULL, device_of(small)
    rates = measure_rates(report, sizes, device)
    # On a GPU the backend of choice; here the same kernels in the interpreter.
    model = build(sizes.shape, sizes.dtype, device, lora="triton" if small else "auto")
    adapter_bytes = load_adapters(
        model, [RANKS[number % len(RANKS)] for number in range(max(sizes.adapters))]
    )
    report.note(
        f"{model.weight_bytes / 1e9:.3g} GB of weights; attention {model.attention_backend}, "
        f"LoRA {model.lora_backend}, linears {model.linear_backend}; "
        f"{len(adapter_bytes)} adapters of ranks {', '.join(map(str, RANKS))} in turn"
    )
    decode_table(report, sizes, rates, model, adapter_bytes)
    prompt_table(report, sizes, rates, model)


def measure_rates(report: Report, sizes: TableSizes, device: torch.device) -> Rates:
    """Measure copying and multiplying; each is a ceiling of what follows."""
    side = sizes.matrix
    copied = copy_seconds(sizes.copy_bytes, device)
    a, b = (torch.randn(side, side, device=device, dtype=sizes.dtype) for _ in range(2))
    multiplied = seconds(lambda: a @ b, device)
    rates = Rates(2 * sizes.copy_bytes / copied, 2 * side**3 / multiplied)
    report.table("Ceilings", ("what", "value"))
    report.row("copy, bytes read and written, GB/s", rates.bytes_s / 1e9)
    report.row(f"product of {side} x {side}, {str(sizes.dtype)[6:]}, TFLOP/s", rates.flops / 1e12)
    return rates


def copy_seconds(nbytes: int, device: torch.device) -> float:
    """Return the time of copying so many bytes on the device."""
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source), device)


class Step:
    """One step of rows with equally many new tokens that can be repeated."""

    def __init__(
        self, model: HFPagedModel, rows: int, tokens: int, context: int, num_adapters: int
    ) -> None:
        blocks = -(-context // BLOCK_SIZE)
        device = model.device
        tables = torch.arange(rows * blocks).view(rows, blocks)
        position = torch.arange(context - tokens, context).repeat(rows)
        row = torch.arange(rows).repeat_interleave(tokens)
        slots = tables[row, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        self._model = model
        self._ids = ((torch.arange(rows * tokens) * 31 + 7) % model.vocab_size).to(device)
        self._positions = position.to(device)
        self._lens = [tokens] * rows, [context] * rows
        self._slots, self._tables = slots.to(device), tables.to(device)
        self._num_decodes = rows if tokens == 1 else 0
        self._logit_rows = torch.arange(tokens - 1, rows * tokens, tokens).to(device)
        self._adapters = [each % num_adapters if num_adapters else None for each in range(rows)]
        self._metadata = self._make_metadata()

    def _make_metadata(self) -> object:
        return self._model.make_metadata(*self._lens, self._slots, self._tables, self._num_decodes)

    def eager(self) -> torch.Tensor:
        """Compute it as the engine does, its layout included."""
        with self._with_adapters():
            return self._forward(self._make_metadata())

    def _with_adapters(self) -> AbstractContextManager[object]:
        assert self._model.lora is not None
        return self._model.lora.step(self._lens[0], self._adapters, self._logit_rows)

    def _forward(self, metadata: object) -> torch.Tensor:
        return self._model.forward(
            self._ids,
            self._positions,
            metadata,
            self._logit_rows,  # type: ignore[arg-type]
        )

    def graph(self, held: ExitStack) -> Callable[[], None]:
        """Capture its kernels; return a call that replays them while ``held`` is open."""
        held.enter_context(self._with_adapters())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles, chooses algorithms, and lays rows out: nothing of that is captured.
            for _ in range(2):
                self._forward(self._metadata)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward(self._metadata)
        return graph.replay


def decode_table(
    report: Report,
    sizes: TableSizes,
    rates: Rates,
    model: HFPagedModel,
    adapter_bytes: list[int],
) -> None:
    """Fill the table of decode steps."""
    report.table(
        f"Decode step, {sizes.context} tokens of context, ms",
        ("rows", "adapters", "eager", "graph", "floor", "share of the floor, %", "tokens/s",
         "added by adapters", "their floor", "added / floor"),
    )  # fmt: skip
    graphs = Graphs(report, model.device)
    for rows in sizes.rows:
        blocks = -(-sizes.context // BLOCK_SIZE)
        model.allocate_cache(rows * blocks, BLOCK_SIZE)
        kv_bytes = rows * sizes.context * sizes.shape.kv_bytes(sizes.dtype)
        embedding = sizes.shape.head_params * sizes.dtype.itemsize
        base_floor = (model.weight_bytes - embedding + kv_bytes) / rates.bytes_s
        base: Measured | None = None
        for adapters in (each for each in sizes.adapters if each <= rows):
            step = Step(model, rows, 1, sizes.context, adapters)
            found = Measured(seconds(step.eager, model.device), graphs.seconds(step))
            base = found if base is None else base
            best, without = found.graph_s or found.eager_s, base.graph_s or base.eager_s
            added_floor = sum(adapter_bytes[:adapters]) / rates.bytes_s
            floor = base_floor + added_floor
            report.row(
                rows, adapters, found.eager_s * 1e3,
                None if found.graph_s is None else found.graph_s * 1e3,
                floor * 1e3, 100 * floor / best, rows / best,
                (best - without) * 1e3 if adapters else None,
                added_floor * 1e3 if adapters else None,
                (best - without) / added_floor if adapters else None,
            )  # fmt: skip
    model.free_cache()


class Graphs:
    """Times steps as captured graphs, until one cannot be."""

    def __init__(self, report: Report, device: torch.device) -> None:
        self._report, self._device = report, device
        self._works = device.type == "cuda"

    def seconds(self, step: Step) -> float | None:
        """Return the time of a replay; None: there are no graphs here."""
        if not self._works:
            return None
        try:
            with ExitStack() as held:
                return seconds(step.graph(held), self._device)
        except Exception as error:  # noqa: BLE001 - any backend may be what cannot be captured
            self._works = False
            words = str(error).strip().splitlines() or [type(error).__name__]
            self._report.note(f"steps cannot be captured in a graph: {words[0]}")
            torch.cuda.synchronize()
            return None


def prompt_table(report: Report, sizes: TableSizes, rates: Rates, model: HFPagedModel) -> None:
    """Fill the table of prompts."""
    report.table(
        "Prompts in one step",
        ("rows", "tokens each", "adapters", "ms", "tokens/s", "floor, ms", "share of the floor, %"),
    )
    shape = sizes.shape
    for rows, tokens in sizes.prompts:
        model.allocate_cache(rows * -(-tokens // BLOCK_SIZE), BLOCK_SIZE)
        # Causal: each token attends to half of its row on average.
        attended = 2 * 2 * shape.layers * shape.heads * shape.head_dim * rows * tokens**2 / 2
        flops = 2 * shape.linear_params * rows * tokens + 2 * shape.head_params * rows + attended
        floor = flops / rates.flops
        for adapters in sorted({0, 1, min(rows, max(sizes.adapters))}):
            step = Step(model, rows, tokens, tokens, adapters)
            took = seconds(step.eager, model.device, most=10)
            report.row(rows, tokens, adapters, took * 1e3, rows * tokens / took, floor * 1e3,
                       100 * floor / took)  # fmt: skip
    model.free_cache()
