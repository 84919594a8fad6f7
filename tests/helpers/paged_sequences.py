"""Sequences computed piece by piece through a paged cache, and what attention over them is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lorax_shard.attention.backend import AttentionBackend, AttentionSpec, StepMetadata
from lorax_shard.attention.kv_cache import KVShape, PagedCache, num_blocks_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYER = 3
# How far a backend's answer may lie from float64's over the same, already rounded, Q, K and V:
# what the sums of float32, or weights and results of half the width, are rounded to.
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


@dataclass
class Sequences:
    """Rows with all their Q, K and V; their blocks lie scattered over the pool."""

    lengths: list[int]
    num_heads: int = 6
    num_kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 4
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = DEVICE
    # Of the cache; None: the same.
    kv_dtype: torch.dtype | None = None
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, dim: int) -> list[torch.Tensor]:
            drawn = [torch.randn(n, heads, dim, generator=generator) * 1.5 for n in self.lengths]
            return [tensor.to(self.dtype) for tensor in drawn]

        self.queries = draw(self.num_heads, self.key_dim)
        self.keys = draw(self.num_kv_heads, self.key_dim)
        self.values = draw(self.num_kv_heads, self.value_dim)
        self.done = [0] * len(self.lengths)
        needed = [num_blocks_for(n, self.block_size) for n in self.lengths]
        order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        self.cache = PagedCache(
            {LAYER: KVShape(self.num_kv_heads, self.key_dim, self.value_dim)},
            num_blocks=sum(needed) + 3,
            block_size=self.block_size,
            dtype=self.kv_dtype or self.dtype,
            device=self.device,
        )

    def metadata(self, backend: AttentionBackend, counts: dict[int, int]) -> StepMetadata:
        """Return the step that computes ``counts[row]`` further tokens of each row.

        Rows with a single token go first.
        """
        rows, spans = self._layout(counts)
        widest = max(len(table) for table in self.tables)
        slots = [self._slot(row, at) for row in rows for at in _range(spans[row])]
        tables = [self.tables[row] + [0] * (widest - len(self.tables[row])) for row in rows]
        return StepMetadata(
            query_lens=[counts[row] for row in rows],
            context_lens=[spans[row].stop for row in rows],
            slots=torch.tensor(slots, device=self.device),
            block_tables=torch.tensor(tables, device=self.device),
            num_decode_rows=sum(counts[row] == 1 for row in rows),
            cache=self.cache,
            backend=backend,
        )

    def fill(self, backend: AttentionBackend, counts: dict[int, int]) -> None:
        """Store the K and V of ``counts[row]`` further tokens without attending to them."""
        metadata = self.metadata(backend, counts)
        _, k, v = self._inputs(counts)
        backend.store(k, v, LAYER, metadata)
        self._advance(counts)

    def step(
        self,
        backend: AttentionBackend,
        spec: AttentionSpec,
        counts: dict[int, int],
        metadata: StepMetadata | None = None,
    ) -> dict[int, torch.Tensor]:
        """Compute ``counts[row]`` further tokens of each row; return their outputs by row."""
        metadata = metadata or self.metadata(backend, counts)
        q, k, v = self._inputs(counts)
        backend.store(k, v, LAYER, metadata)
        output = backend.attend(q, k, v, LAYER, spec, metadata)
        assert output.dtype == self.dtype
        pieces = output.cpu().split(metadata.query_lens)
        self._advance(counts)
        return dict(zip(self._layout(counts)[0], pieces, strict=True))

    def expected(self, row: int, span: slice, spec: AttentionSpec) -> torch.Tensor:
        stored = [[self.cache.as_stored(each) for each in kv] for kv in (self.keys, self.values)]
        whole = (self.queries, *stored)
        return oracle(*(source[row][: span.stop] for source in whole), spec)[span]

    def check(self, backend: AttentionBackend, spec: AttentionSpec, counts: dict[int, int]) -> None:
        before = list(self.done)
        for row, got in self.step(backend, spec, counts).items():
            expected = self.expected(row, slice(before[row], self.done[row]), spec)
            torch.testing.assert_close(got.double(), expected, **TOLERANCES[self.dtype])

    def _layout(self, counts: dict[int, int]) -> tuple[list[int], dict[int, slice]]:
        rows = sorted(counts, key=lambda row: counts[row] > 1)
        return rows, {row: slice(self.done[row], self.done[row] + counts[row]) for row in rows}

    def _inputs(self, counts: dict[int, int]) -> list[torch.Tensor]:
        rows, spans = self._layout(counts)
        return [
            _model_layout(torch.cat([source[row][spans[row]] for row in rows]).to(self.device))
            for source in (self.queries, self.keys, self.values)
        ]

    def _advance(self, counts: dict[int, int]) -> None:
        for row, count in counts.items():
            self.done[row] += count

    def _slot(self, row: int, position: int) -> int:
        block = self.tables[row][position // self.block_size]
        return block * self.block_size + position % self.block_size


def oracle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """Attention of one whole sequence, head by head, in float64 on the CPU."""
    q, k, v = query.double(), key.double(), value.double()
    group = q.shape[1] // k.shape[1]
    at = torch.arange(q.shape[0])
    seen = at[None, :] <= at[:, None]
    if spec.window is not None:
        seen &= at[None, :] > at[:, None] - spec.window
    if spec.chunk is not None:
        seen &= at[None, :] // spec.chunk == at[:, None] // spec.chunk
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T * spec.scaling
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        weights = scores.exp() * seen
        total = weights.sum(dim=1, keepdim=True)
        if spec.sinks is not None:
            total += spec.sinks[head].double().exp().cpu()
        heads.append(weights / total @ v[:, head // group])
    return torch.stack(heads, dim=1)


def _range(span: slice) -> range:
    return range(span.start, span.stop)


def _model_layout(tokens_first: torch.Tensor) -> torch.Tensor:
    """T x heads x dim with the strides that a model's transposed projections have."""
    return tokens_first.transpose(0, 1).contiguous().transpose(0, 1)
