"""The ``flash`` backend: FlashAttention over paged KV, by whoever offers it here.

Sources: Dao et al. 2022, Dao 2023, Shah et al. 2024. Rows with one query and prompt chunks are
asked apart: kernels choose how to split the work by the longest query of a call.
"""

from __future__ import annotations

import functools
import importlib.util
from itertools import accumulate

import torch

from lorax_shard.attention import trial
from lorax_shard.attention.backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    StepMetadata,
)
from lorax_shard.attention.flash.providers import Call, Provider, VarlenBatch, find_all
from lorax_shard.attention.kv_cache import KVShape
from lorax_shard.attention.sdpa import SdpaAttention

_DTYPES = (torch.float16, torch.bfloat16)


class FlashAttention(AttentionBackend):
    """Asks for each layer the best provider that computes it."""

    name = "flash"
    is_partial = True

    def __init__(self, provider: Provider | None = None) -> None:
        """Ask this provider only, or for each layer the best."""
        self._provider = provider

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why no provider can run here, or None."""
        if device.type != "cuda":
            return f"it computes on a GPU, not on {device.type}"
        if dtype not in _DTYPES:
            return f"it does not compute {str(dtype).removeprefix('torch.')}"
        found, refused = _providers(device)
        return None if found else "; ".join(refused)

    @classmethod
    def supports(
        cls, layer: AttentionLayer, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """Return why no provider can compute a layer, or None; the first time it is tried."""
        choice = _choose(layer, device, dtype)
        return choice if isinstance(choice, str) else None

    def store(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, metadata: StepMetadata
    ) -> None:
        """Write finite K and V only: kernels multiply what lies behind a row's end by zero."""
        _storing(key.device).store(key, value, layer, metadata)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> torch.Tensor:
        """Return the attention of decode rows and of prompts, a call for each kind."""
        keys, values = metadata.cache.keys[layer], metadata.cache.values[layer]
        provider = self._provider or _provider_for(query, keys, values, spec)
        # Kernels take rows whose last dimension is dense; models hand over transposed views.
        query = query if query.stride(-1) == 1 else query.contiguous()
        outputs = [
            provider.attend(Call(query[batch.tokens], keys, values, spec, batch))
            for batch in batches(metadata)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def batches(metadata: StepMetadata) -> list[VarlenBatch]:
    """Return the decode rows and the other rows of a step; made in the first layer, and kept."""
    if "flash.batches" not in metadata.scratch:
        tables = metadata.block_tables.to(torch.int32).contiguous()
        num_decode, num_rows = metadata.num_decode_rows, len(metadata.query_lens)
        metadata.scratch["flash.batches"] = [
            _batch(metadata, tables, first, last)
            for first, last in ((0, num_decode), (num_decode, num_rows))
            if first < last
        ]
    found: list[VarlenBatch] = metadata.scratch["flash.batches"]
    return found


def _batch(metadata: StepMetadata, tables: torch.Tensor, first: int, last: int) -> VarlenBatch:
    query_lens = metadata.query_lens[first:last]
    context_lens = metadata.context_lens[first:last]
    start = sum(metadata.query_lens[:first])
    query_starts = list(accumulate(query_lens, initial=0))
    context_starts = list(accumulate(context_lens, initial=0))
    numbers = torch.tensor([*query_starts, *context_starts, *context_lens], dtype=torch.int32)
    if tables.is_cuda:
        # Pinned, so that the copy does not wait for what the device still computes.
        numbers = numbers.pin_memory().to(tables.device, non_blocking=True)
    count = last - first + 1
    return VarlenBatch(
        slice(start, start + query_starts[-1]),
        numbers[:count],
        numbers[count : 2 * count],
        numbers[2 * count :],
        tables[first:last],
        max(query_lens),
        max(context_lens),
    )


def _provider_for(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec
) -> Provider:
    _, block_size, num_kv_heads, key_dim = keys.shape
    kv = KVShape(num_kv_heads, key_dim, values.shape[3])
    asked = AttentionLayer.of(spec, query.shape[1], kv, block_size)
    choice = _choose(asked, query.device, query.dtype)
    if isinstance(choice, str):
        # The registry asks for every layer first, unless it was not told of them.
        raise ValueError(f"flash attention cannot compute {asked}: {choice}")
    return choice


@functools.cache
def _choose(layer: AttentionLayer, device: torch.device, dtype: torch.dtype) -> Provider | str:
    """Return the first provider that computes a layer and is right on a small step."""
    refused = []
    for provider in _providers(device)[0]:
        reason = provider.refuse(layer)
        if reason is None:
            reason = trial.failure(FlashAttention(provider), layer, device, dtype)
        if reason is None:
            return provider
        refused.append(f"{provider.name}: {reason}")
    return "; ".join(refused) or "there is no provider"


@functools.cache
def _storing(device: torch.device) -> AttentionBackend:
    """Return a backend that stores what is finite, on a GPU in one launch."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from lorax_shard.attention.triton.backend import TritonAttention

        return TritonAttention()
    return SdpaAttention()


@functools.cache
def _providers(device: torch.device) -> tuple[list[Provider], list[str]]:
    return find_all(torch.cuda.get_device_capability(device))
