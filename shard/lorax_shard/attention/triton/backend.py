"""The ``triton`` backend: one kernel for prompt chunks, one for decode rows, one that stores.

No kernel is specialised on what varies from step to step, so that ``warm_up`` compiles all there is.

What depends on the step alone (lengths, block tables, tiles of queries, the splits' buffers) is
put on the device in the first layer and kept in the metadata's scratch: no layer waits for the
device, and with a fixed number of splits every launch of a step of R decode rows has the same
shape, whatever the lengths are.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple

import torch

from lorax_shard.attention import trial
from lorax_shard.attention.backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    StepMetadata,
)
from lorax_shard.attention.triton import kernels

_LOG2_E = math.log2(math.e)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The least that a matrix instruction takes.
_LEAST = 16
# Query heads that one program of the decode kernel computes at most.
_DECODE_HEADS = 64
# Programs of the decode kernel for each processor, and what a split has at least to read.
_PROGRAMS_PER_PROCESSOR = 2
_SPLIT_TOKENS = 256
_MOST_SPLITS = 64
# Splits that are combined at once.
_COMBINED = 8
# int32s of one line of a table, so that every line begins at a multiple of 16 bytes.
_ALIGNED = 4
# In the interpreter, whose programs run one after the other.
_CPU_PROCESSORS = 8
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
# some releases of Triton run out of registers.
_PROMPT_HALF = {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)}
_PROMPT_FULL = {64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 4, 2)}
_DECODE_HALF = {64: Tile(0, 128, 4, 2), 128: Tile(0, 64, 4, 3), 256: Tile(0, 32, 4, 2)}
_DECODE_FULL = {64: Tile(0, 32, 4, 2), 128: Tile(0, 32, 8, 2), 256: Tile(0, 16, 4, 2)}
_WIDEST = Tile(_LEAST, _LEAST, 4, 1)


class StepTensors(NamedTuple):
    """A step on the device: R int32 each, and the R x max_blocks block tables as int32."""

    first_tokens: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    tables: torch.Tensor


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

    def store(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, metadata: StepMetadata
    ) -> None:
        """Write K and V in one launch; what is not finite is written as 0, as ``sdpa`` does."""
        key, value = _dense_rows(key), _dense_rows(value)
        num_heads = key.shape[1]
        block_d, block_e = _padded(key.shape[2]), _padded(value.shape[2])
        most = max(1, _STORE_ELEMENTS // max(block_d, block_e))
        block_g = min(_power_of_two(num_heads), most)
        kernels.store[(key.shape[0], -(-num_heads // block_g))](
            key, key.stride(0), key.stride(1), value, value.stride(0), value.stride(1),
            metadata.cache.keys[layer], metadata.cache.values[layer], metadata.slots, num_heads,
            key_dim=key.shape[2], value_dim=value.shape[2],
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
        query = _dense_rows(query)
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        step, told = step_tensors(metadata), _describe(query, layer, spec, metadata)
        if metadata.num_decode_rows:
            self._decode(query, output, told, step, spec, metadata)
        if metadata.num_decode_rows < len(metadata.query_lens):
            _prompt(query, output, told, step, metadata)
        return output

    def _decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        told: _Layer,
        step: StepTensors,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> None:
        rows, num_heads = metadata.num_decode_rows, query.shape[1]
        tile = _tile(told, query.dtype, _DECODE_HALF, _DECODE_FULL)
        group = num_heads // told.num_kv_heads
        heads = min(group, _DECODE_HEADS)
        programs = told.num_kv_heads * -(-group // heads)
        splits = self._num_splits or _choose_splits(rows * programs, spec, metadata, query.device)
        partial, stats = _buffers(splits, rows, num_heads, told, query.device, metadata)
        kernels.decode[(rows, programs, splits)](
            query, query.stride(0), query.stride(1), told.keys, told.values, told.sinks, output,
            partial, stats, step.context_lens, step.tables, step.tables.stride(0),
            told.scale, told.cap, told.num_kv_heads, rows, splits,
            is_split=splits > 1, group=group, heads=heads,
            block_m=max(_LEAST, _power_of_two(heads)), block_n=tile.block_n,
            **told.constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if splits > 1:
            kernels.combine[(rows, num_heads)](
                partial, stats, told.sinks, output, splits, rows, num_heads,
                value_dim=told.constants["value_dim"], has_sinks=told.constants["has_sinks"],
                most_splits=_MOST_SPLITS, block_s=_COMBINED, block_e=told.constants["block_e"],
            )  # fmt: skip


def _prompt(
    query: torch.Tensor,
    output: torch.Tensor,
    told: _Layer,
    step: StepTensors,
    metadata: StepMetadata,
) -> None:
    tile = _tile(told, query.dtype, _PROMPT_HALF, _PROMPT_FULL)
    group = query.shape[1] // told.num_kv_heads
    heads = min(group, tile.block_m)
    tiles = _query_tiles(tile.block_m // heads, metadata)
    kernels.prompt[(tiles.shape[0], told.num_kv_heads * -(-group // heads))](
        query, query.stride(0), query.stride(1), told.keys, told.values, told.sinks, output,
        step.first_tokens, step.query_lens, step.context_lens, step.tables, step.tables.stride(0),
        tiles, told.scale, told.cap, told.num_kv_heads,
        group=group, heads=heads, block_m=tile.block_m, block_n=tile.block_n,
        **told.constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def step_tensors(metadata: StepMetadata) -> StepTensors:
    """Return a step's lengths and tables on the device; made once and kept in its scratch.

    A step whose lengths are to be read from tensors of the caller's (a captured graph) gets
    them by ``metadata.scratch["triton.step"]``.
    """
    found: StepTensors | None = metadata.scratch.get("triton.step")
    if found is None:
        lens = metadata.query_lens
        first_tokens = [0] * len(lens)
        for row, count in enumerate(lens[:-1]):
            first_tokens[row + 1] = first_tokens[row] + count
        behind = [0] * (-len(lens) % _ALIGNED)
        lines = (first_tokens, lens, metadata.context_lens)
        packed = _to_device([line + behind for line in lines], metadata)[:, : len(lens)]
        tables = metadata.block_tables.to(torch.int32).contiguous()
        found = StepTensors(packed[0], packed[1], packed[2], tables)
        metadata.scratch["triton.step"] = found
    return found


def _query_tiles(block_q: int, metadata: StepMetadata) -> torch.Tensor:
    key = f"triton.tiles.{block_q}"
    if key not in metadata.scratch:
        tiles = [
            (row, first)
            for row in range(metadata.num_decode_rows, len(metadata.query_lens))
            for first in range(0, metadata.query_lens[row], block_q)
        ]
        metadata.scratch[key] = _to_device(tiles, metadata)
    found: torch.Tensor = metadata.scratch[key]
    return found


def _to_device(numbers: list[Any], metadata: StepMetadata) -> torch.Tensor:
    """Copy host numbers without waiting for what the device still computes."""
    host, device = torch.tensor(numbers, dtype=torch.int32), metadata.block_tables.device
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _buffers(
    splits: int,
    rows: int,
    num_heads: int,
    told: _Layer,
    device: torch.device,
    metadata: StepMetadata,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where splits leave their parts: layers run one after the other and share it."""
    width = told.constants["value_dim"] if splits > 1 else 0
    key = f"triton.splits.{splits}.{num_heads}.{width}"
    if key not in metadata.scratch:
        partial = torch.empty(splits, rows, num_heads, width, dtype=torch.float32, device=device)
        stats = torch.empty(2, splits, rows, num_heads, dtype=torch.float32, device=device)
        metadata.scratch[key] = partial, stats
    found: tuple[torch.Tensor, torch.Tensor] = metadata.scratch[key]
    return found


def _choose_splits(
    programs: int, spec: AttentionSpec, metadata: StepMetadata, device: torch.device
) -> int:
    """Return how many splits keep the processors busy while each has enough to read."""
    longest = max(metadata.context_lens[: metadata.num_decode_rows])
    for reach in (spec.window, spec.chunk):
        longest = min(longest, reach or longest)
    wanted = -(-_PROGRAMS_PER_PROCESSOR * _num_processors(device) // programs)
    return max(1, min(wanted, -(-longest // _SPLIT_TOKENS), _MOST_SPLITS))


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _describe(
    query: torch.Tensor, layer: int, spec: AttentionSpec, metadata: StepMetadata
) -> _Layer:
    keys, values = metadata.cache.keys[layer], metadata.cache.values[layer]
    if spec.softcap is None:
        scale, cap = spec.scaling * _LOG2_E, 0.0
    else:
        scale, cap = 2 * spec.scaling / spec.softcap * _LOG2_E, spec.softcap * _LOG2_E
    key_dim, value_dim = keys.shape[3], values.shape[3]
    sinks = query if spec.sinks is None else spec.sinks.float().contiguous()
    constants = {
        "key_dim": key_dim,
        "value_dim": value_dim,
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


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(width: int) -> int:
    return max(_LEAST, _power_of_two(width))


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()
