"""Every attention backend that can run here, against a naive float64 oracle.

The oracle never sees the cache: it attends over each row's whole K and V.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from lorax_shard.attention import registry
from lorax_shard.attention.backend import AttentionBackend, AttentionSpec
from lorax_shard.attention.kv_cache import KVShape, PagedCache, num_blocks_for
from lorax_shard.attention.metadata import StepMetadata

CPU = torch.device("cpu")
LAYER = 3


@dataclass
class Sequences:
    """Rows with all their Q, K and V, computed piece by piece through a paged cache."""

    lengths: list[int]
    num_heads: int = 6
    num_kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 4
    seed: int = 0
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, dim: int) -> list[torch.Tensor]:
            return [torch.randn(n, heads, dim, generator=generator) * 1.5 for n in self.lengths]

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
            dtype=torch.float32,
            device=CPU,
        )

    def step(
        self, backend: AttentionBackend, spec: AttentionSpec, counts: dict[int, int]
    ) -> dict[int, torch.Tensor]:
        """Compute ``counts[row]`` further tokens of each row; single tokens go first."""
        rows = sorted(counts, key=lambda row: counts[row] > 1)
        spans = {row: slice(self.done[row], self.done[row] + counts[row]) for row in rows}
        widest = max(len(table) for table in self.tables)
        metadata = StepMetadata(
            query_lens=[counts[row] for row in rows],
            context_lens=[spans[row].stop for row in rows],
            slots=torch.tensor([self._slot(row, at) for row in rows for at in _range(spans[row])]),
            block_tables=torch.tensor(
                [self.tables[row] + [0] * (widest - len(self.tables[row])) for row in rows]
            ),
            num_decode_rows=sum(counts[row] == 1 for row in rows),
            cache=self.cache,
            backend=backend,
        )
        q, k, v = (
            _model_layout(torch.cat([source[row][spans[row]] for row in rows]))
            for source in (self.queries, self.keys, self.values)
        )
        backend.store(k, v, LAYER, metadata)
        output = backend.attend(q, k, v, LAYER, spec, metadata)
        pieces = output.split([counts[row] for row in rows])
        for row in rows:
            self.done[row] = spans[row].stop
        return dict(zip(rows, pieces, strict=True))

    def _slot(self, row: int, position: int) -> int:
        block = self.tables[row][position // self.block_size]
        return block * self.block_size + position % self.block_size

    def expected(self, row: int, span: slice, spec: AttentionSpec) -> torch.Tensor:
        whole = (self.queries, self.keys, self.values)
        return oracle(*(source[row][: span.stop] for source in whole), spec)[span]

    def check(self, backend: AttentionBackend, spec: AttentionSpec, counts: dict[int, int]) -> None:
        before = list(self.done)
        for row, got in self.step(backend, spec, counts).items():
            expected = self.expected(row, slice(before[row], self.done[row]), spec)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5)


def oracle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """Attention of one whole sequence, head by head, in float64."""
    q, k, v = query.double(), key.double(), value.double()
    group = q.shape[1] // k.shape[1]
    at = torch.arange(q.shape[0])
    seen = at[None, :] <= at[:, None]
    if spec.window is not None:
        seen &= at[None, :] > at[:, None] - spec.window
    if spec.chunk is not None:
        seen &= (at // spec.chunk)[None, :] == (at // spec.chunk)[:, None]
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T * spec.scaling
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        weights = scores.exp() * seen
        total = weights.sum(dim=1, keepdim=True)
        if spec.sinks is not None:
            total += spec.sinks[head].double().exp()
        heads.append(weights / total @ v[:, head // group])
    return torch.stack(heads, dim=1)


def _range(span: slice) -> range:
    return range(span.start, span.stop)


def _model_layout(tokens_first: torch.Tensor) -> torch.Tensor:
    """T x heads x dim with the strides that a model's transposed projections have."""
    return tokens_first.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.fixture(params=registry.BACKENDS)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    if reason := registry.probe(request.param, CPU, torch.float32):
        pytest.skip(f"{request.param}: {reason}")
    return registry.create(request.param, CPU, torch.float32)


SCALE = 16**-0.5
SPECS = {
    "plain": AttentionSpec(SCALE),
    "scaled": AttentionSpec(0.31),
    "window": AttentionSpec(SCALE, window=5),
    "window_of_one": AttentionSpec(SCALE, window=1),
    "chunk": AttentionSpec(SCALE, chunk=6),
    "window_in_chunk": AttentionSpec(SCALE, window=4, chunk=7),
    "softcap": AttentionSpec(SCALE, softcap=2.0),
    "sinks": AttentionSpec(SCALE, sinks=torch.linspace(-2.0, 3.0, 6)),
    "everything": AttentionSpec(0.4, window=6, softcap=3.0, sinks=torch.linspace(2.0, -1.0, 6)),
}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> AttentionSpec:
    return SPECS[request.param]


def test_fresh_prompts_of_mixed_lengths(backend: AttentionBackend, spec: AttentionSpec) -> None:
    sequences = Sequences([1, 4, 5, 17, 2, 33])
    sequences.check(backend, spec, dict(enumerate(sequences.lengths)))


def test_chunks_and_decodes_in_one_step(backend: AttentionBackend, spec: AttentionSpec) -> None:
    sequences = Sequences([23, 9, 30, 16, 7])
    sequences.check(backend, spec, {0: 6, 1: 8, 2: 11})
    sequences.check(backend, spec, {1: 1, 0: 5, 2: 1, 3: 15})
    sequences.check(backend, spec, {0: 12, 2: 17, 3: 1, 4: 1})
    sequences.check(backend, spec, {2: 1, 4: 6})
    assert sequences.done == sequences.lengths


def test_every_token_as_a_decode(backend: AttentionBackend, spec: AttentionSpec) -> None:
    sequences = Sequences([14, 5, 9])
    for position in range(14):
        rows = {row: 1 for row, n in enumerate(sequences.lengths) if position < n}
        sequences.check(backend, spec, rows)


def test_decode_rows_of_very_different_lengths(
    backend: AttentionBackend, spec: AttentionSpec
) -> None:
    lengths = [260, 3, 41, 2, 255, 8, 30, 129, 1, 6]
    sequences = Sequences(lengths)
    sequences.step(backend, spec, {row: n - 1 for row, n in enumerate(lengths) if n > 1})
    sequences.check(backend, spec, dict.fromkeys(range(len(lengths)), 1))


def test_long_chunk_after_context(backend: AttentionBackend, spec: AttentionSpec) -> None:
    sequences = Sequences([600])
    sequences.step(backend, spec, {0: 37})
    sequences.check(backend, spec, {0: 563})


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(16, 16), (24, 16), (7, 5), (64, 64), (128, 128)]
)
def test_head_layouts(
    backend: AttentionBackend, num_heads: int, num_kv_heads: int, key_dim: int, value_dim: int
) -> None:
    sequences = Sequences(
        [11, 6, 3],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
    )
    for spec in (SPECS["plain"], AttentionSpec(0.3, window=3, softcap=5.0)):
        sequences.done = [0, 0, 0]
        sequences.check(backend, spec, {0: 7, 1: 5, 2: 2})
        sequences.check(backend, spec, {0: 4, 1: 1, 2: 1})


@pytest.mark.parametrize("block_size", [1, 3, 16, 32])
def test_block_sizes(backend: AttentionBackend, spec: AttentionSpec, block_size: int) -> None:
    sequences = Sequences([35, 18, 40], block_size=block_size)
    sequences.check(backend, spec, {0: 20, 1: 17, 2: 33})
    sequences.check(backend, spec, {0: 15, 1: 1, 2: 1})


def test_a_row_of_nans_harms_no_batch_mate_and_no_later_owner(backend: AttentionBackend) -> None:
    spec = SPECS["plain"]
    sequences = Sequences([10, 10])
    sick = sequences.keys[0], sequences.values[0]
    for broken in sick:
        broken[4:] = float("nan")
        broken[9] = float("inf")
    sequences.check(backend, spec, {0: 4, 1: 4})
    healthy = sequences.step(backend, spec, {0: 6, 1: 5})[1]
    assert_matches = torch.testing.assert_close
    assert_matches(healthy.double(), sequences.expected(1, slice(4, 9), spec), rtol=1e-4, atol=2e-5)

    # Row 1 starts again in the blocks that held the NaNs, shorter than before.
    sequences.tables[1] = list(sequences.tables[0])
    sequences.done[1] = 0
    sequences.check(backend, spec, {1: 5})
    sequences.check(backend, spec, {1: 1})


def test_copied_blocks_read_like_their_source(backend: AttentionBackend) -> None:
    spec = SPECS["window"]
    sequences = Sequences([12, 12])
    sequences.step(backend, spec, {0: 11})
    sequences.queries[1], sequences.keys[1], sequences.values[1] = (
        sequences.queries[0],
        sequences.keys[0],
        sequences.values[0],
    )
    sequences.cache.copy_blocks(sequences.tables[0], sequences.tables[1])
    sequences.done[1] = 11
    sequences.check(backend, spec, {1: 1})
