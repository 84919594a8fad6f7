"""The ``flash`` backend: FlashAttention by whoever offers it here, and ``triton`` for the rest.

Sources: Dao et al. 2022, Dao 2023, Shah et al. 2024. Rows with one query, prompts without a cached
part and other prompts are asked apart: kernels choose how to split the work by the longest query
of a call, and few providers read a cache of any block size.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from lorax_shard.attention import trial
from lorax_shard.attention.backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    FixedDecodes,
    StepMetadata,
)
from lorax_shard.attention.flash.providers import Call, Provider, RowKind, VarlenBatch, find_all
from lorax_shard.attention.kv_cache import KVShape
from lorax_shard.attention.reference import TorchAttention
from lorax_shard.attention.sdpa import SdpaAttention

logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16)


class FlashAttention(AttentionBackend):
    """Asks for each layer and kind of rows the best provider that computes it."""

    name = "flash"
    is_partial = True

    def __init__(self, provider: Provider | None = None) -> None:
        """Ask for each layer the best provider, or this one, and the reference for what it leaves."""
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
        """Return why a layer cannot be computed, or None; the first time providers are tried.

        What no provider computes is left to ``triton``; of a layer they compute something.
        """
        choices = {kind: _choose(kind, layer, device, dtype) for kind in RowKind}
        refused = {kind: each for kind, each in choices.items() if isinstance(each, str)}
        if len(refused) == len(RowKind):
            return next(iter(refused.values()))
        if refused and (reason := _why_no_fallback(device, dtype)):
            kind, words = next(iter(refused.items()))
            return f"{kind.value}: {words}; triton: {reason}"
        return None

    def warm_up(
        self,
        layer: AttentionLayer,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> None:
        """Say who computes what, and have all that is left to ``triton`` compiled."""
        choices = {kind: _choose(kind, layer, device, dtype) for kind in RowKind}
        names = {
            kind: "triton" if isinstance(choice, str) else choice.name
            for kind, choice in choices.items()
        }
        words = ", ".join(f"{kind.value} by {name}" for kind, name in names.items())
        logger.info("flash attention: %s", words)
        if any(isinstance(choice, str) for choice in choices.values()):
            self._fallback(device).warm_up(layer, device, dtype, kv_dtype)

    def fixed_decodes(
        self, layers: Sequence[AttentionLayer], max_rows: int, device: torch.device
    ) -> FixedDecodes | None:
        """Leave decode rows in graphs to ``triton``, where it can run."""
        return _general(device).fixed_decodes(layers, max_rows, device)

    def store(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, metadata: StepMetadata
    ) -> None:
        """Write finite K and V only: kernels multiply what lies behind a row's end by zero."""
        _general(key.device).store(key, value, layer, metadata)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> torch.Tensor:
        """Return the attention of all rows, a call for neighbours of one kind."""
        keys, values = metadata.cache.keys[layer], metadata.cache.values[layer]
        # Kernels take rows whose last dimension is dense; models hand over transposed views.
        query = query if query.stride(-1) == 1 else query.contiguous()
        kv = KVShape(keys.shape[2], keys.shape[3], values.shape[3])
        asked = AttentionLayer.of(spec, query.shape[1], kv, keys.shape[1])
        outputs = []
        for batch in batches(metadata):
            at = batch.tokens
            own = (query[at], key[at], value[at])
            provider = self._provider_for(batch.kind, asked, query)
            if provider is None:
                fallback, part = self._fallback(query.device), part_of(metadata, batch)
                outputs.append(fallback.attend(*own, layer, spec, part))
            else:
                outputs.append(provider.attend(Call(*own, keys, values, spec, batch)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _provider_for(
        self, kind: RowKind, layer: AttentionLayer, query: torch.Tensor
    ) -> Provider | None:
        """Return who computes rows of a kind; None: the fallback."""
        if self._provider is not None:
            return self._provider if kind in self._provider.kinds else None
        choice = _choose(kind, layer, query.device, query.dtype)
        return None if isinstance(choice, str) else choice

    def _fallback(self, device: torch.device) -> AttentionBackend:
        """Return who computes what providers do not: where one is tried, what it is tried against."""
        return TorchAttention() if self._provider is not None else _general(device)


def batches(metadata: StepMetadata) -> list[VarlenBatch]:
    """Return neighbours of one kind in a step's order; made in the first layer, and kept."""
    if "flash.batches" not in metadata.scratch:
        tables = metadata.block_tables.to(torch.int32).contiguous()
        kinds = _kinds(metadata)
        edges = [row for row in range(1, len(kinds)) if kinds[row] is not kinds[row - 1]]
        metadata.scratch["flash.batches"] = [
            _batch(metadata, tables, kinds[first], first, last)
            for first, last in pairwise([0, *edges, len(kinds)])
        ]
    found: list[VarlenBatch] = metadata.scratch["flash.batches"]
    return found


def _kinds(metadata: StepMetadata) -> list[RowKind]:
    num_decode = metadata.num_decode_rows
    lens = zip(metadata.query_lens[num_decode:], metadata.context_lens[num_decode:])
    prompts = [RowKind.FRESH if query == context else RowKind.CACHED for query, context in lens]
    return [RowKind.DECODE] * num_decode + prompts


def part_of(metadata: StepMetadata, batch: VarlenBatch) -> StepMetadata:
    """Return a batch as a step of its own for another backend; made in the first layer, and kept."""
    key = f"flash.part.{batch.rows.start}"
    if key not in metadata.scratch:
        rows = batch.rows
        is_decode = batch.kind is RowKind.DECODE
        metadata.scratch[key] = StepMetadata(
            query_lens=metadata.query_lens[rows],
            context_lens=metadata.context_lens[rows],
            slots=metadata.slots[batch.tokens],
            block_tables=metadata.block_tables[rows],
            num_decode_rows=rows.stop - rows.start if is_decode else 0,
            cache=metadata.cache,
            backend=metadata.backend,
        )
    found: StepMetadata = metadata.scratch[key]
    return found


def _batch(
    metadata: StepMetadata, tables: torch.Tensor, kind: RowKind, first: int, last: int
) -> VarlenBatch:
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
        kind,
        slice(first, last),
        slice(start, start + query_starts[-1]),
        numbers[:count],
        numbers[count : 2 * count],
        numbers[2 * count :],
        tables[first:last],
        max(query_lens),
        max(context_lens),
    )


@functools.cache
def _choose(
    kind: RowKind, layer: AttentionLayer, device: torch.device, dtype: torch.dtype
) -> Provider | str:
    """Return the first provider that computes such rows of a layer and is right on a small step."""
    refused = []
    for provider in _providers(device)[0]:
        if kind not in provider.kinds:
            continue
        reason = _failure(provider, layer, device, dtype)
        if reason is None:
            return provider
        refused.append(f"{provider.name}: {reason}")
    return "; ".join(refused) or "there is no provider"


@functools.cache
def _failure(
    provider: Provider, layer: AttentionLayer, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why a provider does not compute a layer, or None."""
    reason = provider.refuse(layer)
    return reason or trial.failure(FlashAttention(provider), layer, device, dtype)


def _why_no_fallback(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "it is not installed"
    from lorax_shard.attention.triton.backend import TritonAttention

    return TritonAttention.probe(device, dtype)


@functools.cache
def _general(device: torch.device) -> AttentionBackend:
    """Return a backend that stores what is finite, on a GPU in one launch, and computes any layer."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from lorax_shard.attention.triton.backend import TritonAttention

        return TritonAttention()
    return SdpaAttention()


@functools.cache
def _providers(device: torch.device) -> tuple[list[Provider], list[str]]:
    return find_all(torch.cuda.get_device_capability(device))
