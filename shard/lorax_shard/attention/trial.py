"""One small step of a backend, before a model is served with it.

Kernels of other projects refuse shapes by exceptions, by release and by device. A step of random
numbers shows in a moment what no list of limits can promise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorax_shard.attention.backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    StepMetadata,
)
from lorax_shard.attention.kv_cache import PagedCache, num_blocks_for
from lorax_shard.attention.reference import TorchAttention

# Windows and chunks of thousands of tokens shrink to what a small step passes.
_REACH = 21
# Beside these many units of rounding of the largest output, an answer is another one.
_ROUNDINGS = 16
_LAYER = 0


class _Trial(NamedTuple):
    """A step of decode rows, a part of a prompt and whole prompts, over scattered blocks."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    spec: AttentionSpec
    metadata: StepMetadata


def failure(
    backend: AttentionBackend, layer: AttentionLayer, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return in words what is wrong with a backend's answer for a layer, or None."""
    made = _make(backend, layer, device, dtype, dtype)
    try:
        with torch.inference_mode():
            answer = _compute(backend, made).float()
            made.metadata.cache.write(_LAYER, made.key, made.value, made.metadata.slots)
            expected = _attend(TorchAttention(), made).float()
            worst = float((answer - expected).abs().max())
            allowed = _ROUNDINGS * torch.finfo(dtype).eps * float(expected.abs().max())
    # Whatever a foreign kernel raises says that it cannot compute this layer.
    except Exception as error:  # noqa: BLE001
        return f"a trial step failed: {str(error).strip().splitlines()[0]}"
    if worst <= allowed:  # False for NaN
        return None
    return f"a trial step was off by {worst:.2g}, with {allowed:.2g} to be allowed"


def attend(
    backend: AttentionBackend,
    layer: AttentionLayer,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> None:
    """Have a backend compute the step for what that compiles."""
    with torch.inference_mode():
        _compute(backend, _make(backend, layer, device, dtype, kv_dtype))


def _make(
    backend: AttentionBackend,
    layer: AttentionLayer,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> _Trial:
    metadata = _step(layer, backend, device, kv_dtype)
    num_tokens = metadata.slots.shape[0]
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(rows, heads, dim, generator=generator).to(device, dtype)

    kv, cache = layer.kv, metadata.cache
    query = draw(num_tokens, layer.num_heads, kv.key_dim)
    key, value = draw(num_tokens, kv.num_heads, kv.key_dim), draw(num_tokens, *kv[::2])
    for pool in (cache.keys[_LAYER], cache.values[_LAYER]):
        pool.copy_(draw(pool.shape[0] * pool.shape[1], *pool.shape[2:]).view_as(pool))
    return _Trial(query, key, value, _shrunk(layer, device), metadata)


def _compute(backend: AttentionBackend, made: _Trial) -> torch.Tensor:
    backend.store(made.key, made.value, _LAYER, made.metadata)
    return _attend(backend, made)


def _attend(backend: AttentionBackend, made: _Trial) -> torch.Tensor:
    query, key, value, spec, metadata = made
    return backend.attend(query, key, value, _LAYER, spec, metadata)


def _shrunk(layer: AttentionLayer, device: torch.device) -> AttentionSpec:
    return AttentionSpec(
        scaling=layer.kv.key_dim**-0.5,
        window=layer.window and min(layer.window, _REACH),
        chunk=layer.chunk and min(layer.chunk, _REACH),
        softcap=layer.softcap,
        sinks=torch.linspace(-1, 1, layer.num_heads, device=device) if layer.has_sinks else None,
    )


def _step(
    layer: AttentionLayer, backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> StepMetadata:
    size = layer.block_size
    query_lens, context_lens = [1, 1, 37, 45, 9], [2 * size + 3, 7, size + 40, 45, 9]
    width, num_rows = max(num_blocks_for(length, size) for length in context_lens), len(query_lens)
    # Neighbours in a sequence lie apart, and backwards.
    tables = torch.arange(num_rows * width).flip(0).view(width, num_rows).t().contiguous()
    slots = [
        int(tables[row, at // size]) * size + at % size
        for row, (count, length) in enumerate(zip(query_lens, context_lens, strict=True))
        for at in range(length - count, length)
    ]
    cache = PagedCache(
        {_LAYER: layer.kv}, num_blocks=num_rows * width, block_size=size, dtype=dtype, device=device
    )
    return StepMetadata(
        query_lens=query_lens,
        context_lens=context_lens,
        slots=torch.tensor(slots, device=device),
        block_tables=tables.to(device),
        num_decode_rows=query_lens.count(1),
        cache=cache,
        backend=backend,
    )
