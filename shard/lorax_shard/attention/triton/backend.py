"""The ``triton`` backend: one kernel for prompt chunks, one for decode rows, one that stores.

No kernel is specialised on what varies from step to step, so that ``warm_up`` compiles all there is.

What depends on the step alone (lengths, block tables, tiles of queries, splits of decode rows) is
put on the device in the first layer and kept in the metadata's scratch: no layer waits for the
device, and with a fixed number of splits every launch of a step of R decode rows has the same
shape, whatever the lengths are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorax_shard.attention import trial
from lorax_shard.attention.backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    FixedDecodes,
    StepMetadata,
)
from lorax_shard.attention.triton import kernels
from lorax_shard.attention.triton.combine_kernel import combine
from lorax_shard.attention.triton.fixed import FixedTritonDecodes
from lorax_shard.attention.triton.programs import decode_programs, num_processors
from lorax_shard.attention.triton.splits import MOST_SPLITS
from lorax_shard.attention.triton.step_tensors import (
    DeviceSplits,
    StepTensors,
    device_splits,
    step_tensors,
)

_LOG2_E = math.log2(math.e)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The least that a matrix instruction takes.
_LEAST = 16
# Splits that are combined at once.
_COMBINED = 8
# Addresses, in bytes, and strides, in elements, that are multiples of this are read in whole lines.
_UNIT = 16
# A window or chunk that nothing passes.
_ENDLESS = 1 << 30
# Elements of K that one program stores.
_STORE_ELEMENTS = 2048


class Tile(NamedTuple):
    """Launch sizes: rows of queries, keys, warps, and loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By the most columns of K or V, padded to a power of two. K and V of all stages beside Q fit
# the 99 KiB of shared memory that the smallest supported GPUs give a program; with fewer warps
# some releases of Triton run out of registers. With five stages decodes load one tile of K and V
# while they multiply the one before (with two to four the compiler makes room for a single one,
# and loads wait for products), and four programs are on a processor at once.
_PROMPT_HALF = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)}
_PROMPT_FULL = {64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 4, 2)}
_DECODE_HALF = {64: Tile(0, 64, 4, 5), 128: Tile(0, 32, 4, 5), 256: Tile(0, 16, 4, 5)}
_DECODE_FULL = {64: Tile(0, 32, 4, 2), 128: Tile(0, 32, 8, 2), 256: Tile(0, 16, 4, 2)}
_WIDEST = Tile(_LEAST, _LEAST, 4, 1)


class _Strided(NamedTuple):
    """A T x H x D tensor, and in units how far its tokens and heads are apart."""

    tensor: torch.Tensor
    token: int
    head: int


class _Layer(NamedTuple):
    """What the kernels are told of one layer."""

    keys: torch.Tensor
    values: torch.Tensor
    sinks: torch.Tensor
    scale: float
    cap: float
    num_kv_heads: int
    constants: dict[str, Any]


class TritonAttention(AttentionBackend):
    """Needs a GPU; on a CPU it runs in Triton's interpreter, which is for tests."""

    name = "triton"

    def __init__(self, num_splits: int | None = None) -> None:
        """Fix the number of splits of a decode row's context, or have it chosen step by step."""
        self._num_splits = num_splits

    @classmethod
    def refuses_cache(cls, kv_dtype: torch.dtype, device: torch.device) -> str | None:  # noqa: ARG003 - there is one
        """Return why it cannot read a narrower cache, or None: GPUs know E4M3 from 8.9 on."""
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "this GPU has no fp8; it takes compute capability 8.9"
        return None

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot run here, or None."""
        if dtype not in _DTYPES:
            return f"it does not compute {str(dtype).removeprefix('torch.')}"
        if device.type == "cuda":
            return None
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"it computes on a GPU, not on {device.type}"
        return "Triton's interpreter cannot multiply bfloat16" if dtype is torch.bfloat16 else None

    def warm_up(
        self,
        layer: AttentionLayer,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> None:
        """Compute a small step with splits and without."""
        for num_splits in (1, 2):
            trial.attend(TritonAttention(num_splits), layer, device, dtype, kv_dtype)

    def fixed_decodes(
        self, layers: Sequence[AttentionLayer], max_rows: int, device: torch.device
    ) -> FixedDecodes:
        """Return how decode steps are captured: splits are laid out on the host, and read by kernels."""
        return FixedTritonDecodes(self, self._num_splits, layers, max_rows, device)

    def store(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, metadata: StepMetadata
    ) -> None:
        """Write K and V in one launch; what is not finite is written as 0, as ``sdpa`` does."""
        num_tokens, num_heads, key_dim = key.shape
        value_dim = value.shape[2]
        block_d, block_e = _padded(key_dim), _padded(value_dim)
        most = max(1, _STORE_ELEMENTS // max(block_d, block_e))
        block_g = min(_power_of_two(num_heads), most)
        kernels.store[(num_tokens, -(-num_heads // block_g))](
            *_strided(key), *_strided(value),
            metadata.cache.keys[layer], metadata.cache.values[layer], metadata.slots, num_heads,
            key_dim=key_dim, value_dim=value_dim,
            key_unit=_unit(key_dim), value_unit=_unit(value_dim),
            block_g=block_g, block_d=block_d, block_e=block_e,
        )  # fmt: skip

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> torch.Tensor:
        """Return the attention of decode rows and of prompts, a kernel for each kind."""
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        step, told = step_tensors(metadata), _describe(layer, spec, metadata)
        strided, num_decodes = _strided(query), metadata.num_decode_rows
        if num_decodes:
            self._decode(strided, output, told, step, spec, metadata)
        if num_decodes < len(metadata.query_lens):
            self._prompt(strided, output, told, step, spec, metadata)
        return output

    def _decode(
        self,
        query: _Strided,
        output: torch.Tensor,
        told: _Layer,
        step: StepTensors,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> None:
        tile = _tile(told, output.dtype, _DECODE_HALF, _DECODE_FULL)
        group, heads, programs = decode_programs(output.shape[1], told.num_kv_heads)
        rows = slice(0, metadata.num_decode_rows)
        split = self._split(metadata, rows, output, spec, block_q=1, programs=programs)
        kernels.decode[(split.num, programs)](
            *query, told.keys, told.values, told.sinks, output,
            split.partial, split.stats, split.splits, split.num_places,
            step.context_lens, step.tables, step.tables.stride(0),
            told.scale, told.cap, told.num_kv_heads,
            is_split=split.is_split, group=group, heads=heads,
            block_m=max(_LEAST, _power_of_two(heads)), block_n=tile.block_n,
            **told.constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _combine(split, output, told, 1, first_token=0)

    def _prompt(
        self,
        query: _Strided,
        output: torch.Tensor,
        told: _Layer,
        step: StepTensors,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> None:
        tile = _tile(told, output.dtype, _PROMPT_HALF, _PROMPT_FULL)
        group = output.shape[1] // told.num_kv_heads
        heads = min(group, tile.block_m)
        block_q, programs = tile.block_m // heads, told.num_kv_heads * -(-group // heads)
        num_decodes = metadata.num_decode_rows
        rows = slice(num_decodes, len(metadata.query_lens))
        split = self._split(metadata, rows, output, spec, block_q=block_q, programs=programs)
        kernels.prompt[(split.num, programs)](
            *query, told.keys, told.values, told.sinks, output,
            split.partial, split.stats, split.splits, split.num_places,
            *(each[num_decodes:] for each in step[:3]), step.tables[num_decodes:],
            step.tables.stride(0), told.scale, told.cap, told.num_kv_heads,
            is_split=split.is_split, group=group, heads=heads,
            block_m=tile.block_m, block_n=tile.block_n,
            **told.constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _combine(split, output, told, block_q, first_token=num_decodes)

    def _split(
        self,
        metadata: StepMetadata,
        rows: slice,
        output: torch.Tensor,
        spec: AttentionSpec,
        *,
        block_q: int,
        programs: int,
    ) -> DeviceSplits:
        num, fixed = num_processors(output.device), self._num_splits
        return device_splits(
            metadata, rows, output, spec,
            block_q=block_q, programs=programs, num_processors=num, fixed=fixed,
        )  # fmt: skip


def _combine(
    split: DeviceSplits, output: torch.Tensor, told: _Layer, block_q: int, *, first_token: int
) -> None:
    """Add what splits have left up, if some tile has several."""
    if not split.is_split:
        return
    num_heads = output.shape[1]
    combine[(len(split.queries), num_heads)](
        split.partial, split.stats, told.sinks, output, split.queries, split.num_places, block_q,
        first_token, num_heads,
        value_dim=told.constants["value_dim"], has_sinks=told.constants["has_sinks"],
        most_splits=MOST_SPLITS, block_s=_COMBINED, block_e=told.constants["block_e"],
    )  # fmt: skip


def _describe(layer: int, spec: AttentionSpec, metadata: StepMetadata) -> _Layer:
    keys, values = metadata.cache.keys[layer], metadata.cache.values[layer]
    if spec.softcap is None:
        scale, cap = spec.scaling * _LOG2_E, 0.0
    else:
        scale, cap = 2 * spec.scaling / spec.softcap * _LOG2_E, spec.softcap * _LOG2_E
    key_dim, value_dim = keys.shape[3], values.shape[3]
    sinks = keys if spec.sinks is None else spec.sinks.float().contiguous()
    constants = {
        "key_dim": key_dim,
        "value_dim": value_dim,
        "key_unit": _unit(key_dim),
        "block_size": metadata.cache.block_size,
        "window": spec.window or _ENDLESS,
        "chunk": spec.chunk or _ENDLESS,
        "is_local": spec.window is not None or spec.chunk is not None,
        "has_softcap": spec.softcap is not None,
        "has_sinks": spec.sinks is not None,
        "block_d": _padded(key_dim),
        "block_e": _padded(value_dim),
    }
    return _Layer(keys, values, sinks, scale, cap, keys.shape[2], constants)


def _tile(told: _Layer, dtype: torch.dtype, half: dict[int, Tile], full: dict[int, Tile]) -> Tile:
    width = max(64, told.constants["block_d"], told.constants["block_e"])
    return (full if dtype is torch.float32 else half).get(width, _WIDEST)


def _strided(x: torch.Tensor) -> _Strided:
    """Return a tensor as kernels read it: a copy where its heads do not begin at units.

    What a step's number of tokens makes of strides and addresses then compiles nothing anew.
    """
    unit = _unit(x.shape[2])
    # Of one token or head it says nothing.
    token, head = (x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 1))
    if x.stride(2) != 1 or token % unit or head % unit or x.data_ptr() % _UNIT:
        x = x.clone(memory_format=torch.contiguous_format)
        token, head = x.stride(0), x.stride(1)
    return _Strided(x, token // unit, head // unit)


def _unit(width: int) -> int:
    """Return the largest power of two, at most a unit, whose multiple a width is."""
    return min(_UNIT, width & -width)


def _padded(width: int) -> int:
    return max(_LEAST, _power_of_two(width))


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()
