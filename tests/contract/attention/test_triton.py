"""What the ``triton`` backend has beside the others: splits, tiles, half the width."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton does not run on this platform")

# After the question whether they can be.
from tests.helpers.paged_sequences import DEVICE, LAYER, TOLERANCES, Sequences

from lorax_shard.attention.backend import AttentionSpec, StepMetadata
from lorax_shard.attention.triton import backend as triton_backend
from lorax_shard.attention.triton import splits
from lorax_shard.attention.triton.backend import TritonAttention

SINKS = torch.linspace(-1.0, 2.0, 6, device=DEVICE)
SPECS = {
    "window": AttentionSpec(0.25, window=5),
    "window_of_one": AttentionSpec(0.25, window=1),
    "chunk": AttentionSpec(0.25, chunk=6),
    "softcap": AttentionSpec(0.25, softcap=2.0),
    "sinks": AttentionSpec(0.25, sinks=SINKS),
}
# Of the first step; half of each row comes from before it.
PATTERNS = {
    "identical": [9, 9, 9],
    "distinct": [3, 12, 7],
    "uniform": [8, 8, 4, 4],
    "skewed": [44, 2, 3, 5],
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_prompts_chunks_and_split_decodes(spec: AttentionSpec) -> None:
    sequences = Sequences([20, 9, 75])
    backend = TritonAttention(num_splits=2)
    sequences.fill(backend, {0: 6, 2: 73})
    sequences.check(backend, spec, {0: 13, 1: 9, 2: 1})
    sequences.check(backend, spec, {0: 1, 2: 1})


@pytest.mark.parametrize("lengths", PATTERNS.values(), ids=list(PATTERNS))
def test_patterns_of_lengths(lengths: list[int]) -> None:
    spec = AttentionSpec(0.25, window=7, softcap=3.0, sinks=SINKS)
    sequences = Sequences([n + 1 for n in lengths])
    sequences.fill(TritonAttention(), {row: n // 2 for row, n in enumerate(lengths) if n > 1})
    sequences.check(TritonAttention(), spec, {row: n - n // 2 for row, n in enumerate(lengths)})
    sequences.check(TritonAttention(3), spec, dict.fromkeys(range(len(lengths)), 1))


@pytest.mark.parametrize("reach", [{"window": 75}, {"window": 90, "chunk": 100}])
def test_reaches_beyond_whole_tiles_of_keys(reach: dict[str, int]) -> None:
    """Of the keys that a tile of queries sees, those in the middle need no mask."""
    sequences = Sequences([150, 140, 139])
    sequences.fill(TritonAttention(), {0: 149, 1: 110, 2: 138})
    spec = AttentionSpec(0.25, **reach)
    sequences.check(TritonAttention(1), spec, {0: 1, 1: 30})
    sequences.check(TritonAttention(2), spec, {2: 1})


def test_one_decode_among_long_prompts() -> None:
    sequences = Sequences([30, 30, 9])
    sequences.fill(TritonAttention(), {1: 29})
    sequences.check(TritonAttention(), AttentionSpec(0.25), {0: 30, 1: 1, 2: 9})


@pytest.mark.parametrize("group", [1, 5, 70])
def test_query_heads_of_any_number_share_a_kv_head(group: int) -> None:
    """More of them than a tile has rows are computed in parts."""
    sequences = Sequences([6, 5], num_heads=group, num_kv_heads=1)
    sequences.check(TritonAttention(), AttentionSpec(0.25), {0: 4, 1: 1})
    sequences.check(TritonAttention(2), AttentionSpec(0.25), {0: 1, 1: 1})


@pytest.mark.parametrize(("key_dim", "value_dim"), [(192, 128), (80, 80), (512, 512)])
def test_wide_heads(key_dim: int, value_dim: int) -> None:
    sequences = Sequences([5, 3], key_dim=key_dim, value_dim=value_dim)
    spec = AttentionSpec(key_dim**-0.5, window=3)
    sequences.check(TritonAttention(), spec, {0: 4, 1: 1})
    sequences.check(TritonAttention(2), spec, {0: 1, 1: 2})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_width(dtype: torch.dtype) -> None:
    if reason := TritonAttention.probe(DEVICE, dtype):
        pytest.skip(reason)
    sequences = Sequences([30, 70, 9], dtype=dtype, block_size=16)
    sequences.fill(TritonAttention(), {1: 69})
    sequences.check(TritonAttention(3), AttentionSpec(0.25, sinks=SINKS), {0: 29, 1: 1, 2: 8})
    sequences.check(TritonAttention(3), AttentionSpec(0.25), {0: 1, 2: 1})


@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_splits_without_a_key_count_nothing(num_splits: int) -> None:
    sequences = Sequences([100, 1, 2])
    sequences.fill(TritonAttention(), {0: 99, 2: 1})
    spec = AttentionSpec(0.25, sinks=SINKS)
    sequences.check(TritonAttention(num_splits), spec, {0: 1, 1: 1, 2: 1})


def test_a_decode_row_of_no_length_gives_zeros() -> None:
    """A captured graph of more rows than a step has runs the rest with no length."""
    sequences = Sequences([5, 5])
    for num_splits in (1, 2):
        backend = TritonAttention(num_splits)
        metadata = sequences.metadata(backend, {0: 1, 1: 1})
        tensors = triton_backend.step_tensors(metadata)
        lengths = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
        metadata.scratch["triton.step"] = tensors._replace(context_lens=lengths)
        q = torch.randn(2, 6, 16, device=DEVICE)
        k = v = torch.ones(2, 2, 16, device=DEVICE)
        backend.store(k, v, LAYER, metadata)
        output = backend.attend(q, k, v, LAYER, AttentionSpec(0.25), metadata)
        torch.testing.assert_close(output[0], torch.ones_like(output[0]))
        assert output[1].count_nonzero() == 0


def test_layers_share_what_the_step_needs() -> None:
    sequences = Sequences([40, 9])
    backend = TritonAttention(2)
    sequences.fill(backend, {0: 39})
    metadata = sequences.metadata(backend, {0: 1, 1: 9})
    q, k, v = (torch.randn(10, heads, 16, device=DEVICE) for heads in (6, 2, 2))
    backend.attend(q, k, v, LAYER, AttentionSpec(0.25), metadata)
    first = dict(metadata.scratch)
    backend.attend(q, k, v, LAYER, AttentionSpec(0.5, window=4), metadata)
    assert first.keys() == metadata.scratch.keys()
    assert all(first[key] is metadata.scratch[key] for key in first)


@pytest.mark.parametrize("rules", [{}, {"window": 200}, {"chunk": 160}, {"sinks": SINKS}])
def test_a_long_row_among_short_ones_is_split_alone(rules: dict[str, Any]) -> None:
    lengths = [9, 301, 1, 70, 64]
    sequences = Sequences(lengths)
    backend = TritonAttention()
    sequences.fill(backend, {row: n - 1 for row, n in enumerate(lengths) if n > 1})
    counts = dict.fromkeys(range(len(lengths)), 1)
    spec = AttentionSpec(0.25, **rules)
    metadata = sequences.metadata(backend, counts)
    got = sequences.step(backend, spec, counts, metadata)
    for row, n in enumerate(lengths):
        expected = sequences.expected(row, slice(n - 1, n), spec)
        torch.testing.assert_close(got[row].double(), expected, **TOLERANCES[torch.float32])
    made = next(each for key, each in metadata.scratch.items() if key.startswith("triton.splits"))
    assert made.queries[[0, 2, 3, 4], 1].tolist() == [1, 1, 1, 1]
    assert made.queries[1, 1] >= 2


@pytest.mark.parametrize("rules", [{}, {"window": 150}, {"chunk": 140}, {"sinks": SINKS}])
def test_few_queries_behind_a_long_context_are_split(
    rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a prompt whose beginning is cached, and drafts that are checked."""
    monkeypatch.setattr(splits, "PROMPT", splits.SplitRule(1, 32, 2))
    sequences = Sequences([270, 40, 5])
    backend = TritonAttention()
    sequences.fill(backend, {0: 265, 1: 20})
    counts = {0: 5, 1: 20, 2: 5}
    spec = AttentionSpec(0.25, **rules)
    metadata = sequences.metadata(backend, counts)
    got = sequences.step(backend, spec, counts, metadata)
    for row, n in enumerate(sequences.lengths):
        expected = sequences.expected(row, slice(n - counts[row], n), spec)
        torch.testing.assert_close(got[row].double(), expected, **TOLERANCES[torch.float32])
    made = next(each for key, each in metadata.scratch.items() if key.startswith("triton.splits"))
    assert made.queries[:5, 1].min() >= 2
    assert made.queries[-5:, 1].tolist() == [1] * 5


def window_off_by_one(spec: AttentionSpec, metadata: StepMetadata) -> AttentionSpec:
    return spec._replace(window=spec.window + 1)


def missing_sinks(spec: AttentionSpec, metadata: StepMetadata) -> AttentionSpec:
    return spec._replace(sinks=None)


def missing_softcap(spec: AttentionSpec, metadata: StepMetadata) -> AttentionSpec:
    return spec._replace(softcap=None)


def wrong_block(spec: AttentionSpec, metadata: StepMetadata) -> AttentionSpec:
    metadata.block_tables[0, 4] = metadata.block_tables[0, 0]
    return spec


def length_off_by_one(spec: AttentionSpec, metadata: StepMetadata) -> AttentionSpec:
    metadata.context_lens[0] -= 1
    return spec


def no_fault(spec: AttentionSpec, metadata: StepMetadata) -> AttentionSpec:
    return spec


@pytest.mark.parametrize(
    "fault",
    [window_off_by_one, missing_sinks, missing_softcap, wrong_block, length_off_by_one],
)
@pytest.mark.parametrize("num_queries", [1, 3])
def test_planted_faults_are_caught(fault: Any, num_queries: int) -> None:
    spec = AttentionSpec(0.25, window=6, softcap=3.0, sinks=SINKS)

    def distance(change: Any) -> float:
        sequences = Sequences([20])
        backend = TritonAttention(2)
        sequences.fill(backend, {0: 20 - num_queries})
        metadata = sequences.metadata(backend, {0: num_queries})
        wrong = change(spec, metadata)
        got = sequences.step(backend, wrong, {0: num_queries}, metadata)[0].double()
        expected = sequences.expected(0, slice(20 - num_queries, 20), spec)
        return float((got - expected).abs().max())

    allowed = TOLERANCES[torch.float32]["atol"]
    assert distance(no_fault) <= allowed
    assert distance(fault) > 100 * allowed
