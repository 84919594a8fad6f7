"""Launch sizes of the kernels side by side, at the shapes of an 8B model: what to choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from bench.gpu_check import preflight
from bench.gpu_check.measure import Graphs
from bench.gpu_check.models import BLOCK_SIZE, device_of
from bench.gpu_check.report import Report

from lorax_shard.attention.backend import AttentionSpec, StepMetadata
from lorax_shard.attention.kv_cache import KVShape, PagedCache, num_blocks_for
from lorax_shard.attention.triton import backend as attention
from lorax_shard.lora.assignment import Assignment
from lorax_shard.lora.backend import GroupWeights
from lorax_shard.lora.triton import backend as lora

# Beyond what a GPU's caches hold: calls in a row read layer after layer.
_COLD_BYTES = 128 << 20


class DecodeShape(NamedTuple):
    """The lengths of rows that decode together."""

    label: str
    lengths: tuple[int, ...]


class SweepSizes(NamedTuple):
    """What is swept."""

    heads: int
    kv: KVShape
    dtype: torch.dtype
    shapes: tuple[DecodeShape, ...]
    stages: tuple[int, ...]
    block_n: tuple[int, ...]
    # Rows, adapters and rank; the widths of a group: in, and out of each member.
    adapters: tuple[tuple[int, int, int], ...]
    width: int
    outs: tuple[int, ...]
    warps: tuple[int, ...]
    preflight: preflight.PreflightSizes


FULL = SweepSizes(
    32, KVShape(8, 128, 128), torch.bfloat16,
    (DecodeShape("1 x 512", (512,)), DecodeShape("64 x 2k", (2048,) * 64),
     DecodeShape("256 x 512", (512,) * 256), DecodeShape("32k + 63 x 128", (32768, *[128] * 63))),
    (2, 3, 5), (32, 64, 128),
    ((64, 32, 16), (64, 1, 16), (256, 128, 32), (8, 8, 64)), 4096, (4096, 1024, 1024), (4, 8),
    preflight.FULL,
)  # fmt: skip
SMALL = SweepSizes(
    4, KVShape(2, 16, 16), torch.float32, (DecodeShape("2 x 20", (20, 20)),), (2,), (16, 32),
    ((2, 2, 4),), 64, (32, 16), (4,), preflight.SMALL,
)  # fmt: skip


def run(report: Report, *, small: bool) -> None:
    """Fill a table for each kind of kernel."""
    sizes, device = SMALL if small else FULL, device_of(small)
    bytes_s = preflight.measure(sizes.preflight, device).read_bytes_s
    graphs = Graphs(report, device)
    decode_table(report, sizes, device, graphs, bytes_s)
    expand_table(report, sizes, device, graphs, bytes_s)


def decode_table(
    report: Report, sizes: SweepSizes, device: torch.device, graphs: Graphs, bytes_s: float
) -> None:
    """Time one layer's decode attention by tile."""
    tiles = [(stages, block) for stages in sizes.stages for block in sizes.block_n]
    columns = [f"{block} keys, {stages} stages" for stages, block in tiles]
    report.table("Decode attention of one layer, µs", ("rows", "floor", *columns))
    for shape in sizes.shapes:
        layers = DecodeLayers(shape, sizes, device)
        took = []
        for stages, block_n in tiles:
            with decode_tile(sizes, stages, block_n):
                took.append(graphs.per_call(layers.attend, layers.num))
        floor = layers.bytes_of_one / bytes_s
        report.row(shape.label, floor * 1e6, *(each and each * 1e6 for each in took))
        del layers


class DecodeLayers:
    """Layers that are alike, attended to one after the other."""

    def __init__(self, shape: DecodeShape, sizes: SweepSizes, device: torch.device) -> None:
        kv, lengths = sizes.kv, list(shape.lengths)
        blocks = [num_blocks_for(length, BLOCK_SIZE) for length in lengths]
        per_token = kv.num_heads * (kv.key_dim + kv.value_dim) * sizes.dtype.itemsize
        self.bytes_of_one = sum(lengths) * per_token
        self.num = 2 if device.type == "cpu" else max(2, -(-_COLD_BYTES // self.bytes_of_one))
        cache = PagedCache(
            dict.fromkeys(range(self.num), kv), num_blocks=sum(blocks), block_size=BLOCK_SIZE,
            dtype=sizes.dtype, device=device,
        )  # fmt: skip
        tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int64)
        for row, count in enumerate(blocks):
            tables[row, :count] = torch.arange(count) + sum(blocks[:row])
        self._backend = attention.TritonAttention()
        self._metadata = StepMetadata(
            query_lens=[1] * len(lengths), context_lens=lengths,
            slots=torch.zeros(len(lengths), dtype=torch.int64, device=device),
            block_tables=tables.to(device), num_decode_rows=len(lengths), cache=cache,
            backend=self._backend,
        )  # fmt: skip
        self._query = torch.zeros(
            len(lengths), sizes.heads, kv.key_dim, dtype=sizes.dtype, device=device
        )
        self._own = self._query[:, : kv.num_heads]
        self._spec = AttentionSpec(kv.key_dim**-0.5)
        self._next = 0

    def attend(self) -> torch.Tensor:
        """Attend in the next layer."""
        self._next = (self._next + 1) % self.num
        return self._backend.attend(
            self._query, self._own, self._own, self._next, self._spec, self._metadata
        )


@contextmanager
def decode_tile(sizes: SweepSizes, stages: int, block_n: int) -> Iterator[None]:
    """Within, decodes of the width at hand take this tile."""
    tiles = attention._DECODE_FULL if sizes.dtype is torch.float32 else attention._DECODE_HALF
    width = max(64, sizes.kv.key_dim)
    before = tiles[width]
    tiles[width] = before._replace(block_n=block_n, num_stages=stages)
    try:
        yield
    finally:
        tiles[width] = before


def expand_table(
    report: Report, sizes: SweepSizes, device: torch.device, graphs: Graphs, bytes_s: float
) -> None:
    """Time a group's two launches by the warps of the second."""
    columns = [f"{warps} warps" for warps in sizes.warps]
    report.table("A group of adapters, µs", ("rows", "adapters", "rank", "floor", *columns))
    for rows, num_adapters, rank in sizes.adapters:
        groups = AdapterGroups(rows, num_adapters, rank, sizes, device)
        took = []
        for warps in sizes.warps:
            with expand_warps(warps):
                took.append(graphs.per_call(groups.compute, groups.num))
        floor = groups.bytes_of_one / bytes_s
        report.row(rows, num_adapters, rank, floor * 1e6, *(each and each * 1e6 for each in took))
        del groups


class AdapterGroups:
    """Groups that are alike, computed one after the other."""

    def __init__(
        self, rows: int, num_adapters: int, rank: int, sizes: SweepSizes, device: torch.device
    ) -> None:
        outs, width = sizes.outs, sizes.width
        elements = rank * (len(outs) * width + sum(outs)) * num_adapters
        self.bytes_of_one = elements * sizes.dtype.itemsize
        self.num = 2 if device.type == "cpu" else max(2, -(-_COLD_BYTES // self.bytes_of_one))
        backend = lora.TritonLora()
        self._groups = [backend.make_group(len(outs)) for _ in range(self.num)]

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=sizes.dtype, device=device)

        for group in self._groups:
            for slot in range(num_adapters):
                b = tuple(zeros(rank, out) for out in outs)
                group.load(slot, GroupWeights(zeros(rank * len(outs), width), b))
        backend.commit(device)
        self._x, self._y = zeros(rows, width), zeros(rows, sum(outs))
        self._columns = tuple(np.cumsum((0, *outs[:-1])).tolist())
        self._rows = Assignment(np.arange(rows, dtype=np.int64) % num_adapters, device)
        self._next = 0

    def compute(self) -> None:
        """Compute the next group."""
        self._next = (self._next + 1) % self.num
        group: Any = self._groups[self._next]
        shrunk = group.shrink(self._x, self._rows)
        group.expand_all(shrunk, self._columns, self._y, self._rows)


@contextmanager
def expand_warps(warps: int) -> Iterator[None]:
    """Within, what expands takes so many warps."""
    tables = (lora._EXPAND_HALF, lora._EXPAND_FULL)
    before = [dict(table) for table in tables]
    for table in tables:
        table.update({rows: tile._replace(num_warps=warps) for rows, tile in table.items()})
    try:
        yield
    finally:
        for table, tiles in zip(tables, before, strict=True):
            table.update(tiles)
