"""The ``cpp`` backend: few tokens of a row by a kernel of our own, prompts as ``sdpa`` does them.

``decode.cpp`` and ``store.cpp`` are compiled for this very CPU when they are first asked for;
see ``native``.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorax_shard.attention.backend import AttentionSpec, StepMetadata
from lorax_shard.attention.kv_cache import NO_SLOT
from lorax_shard.attention.sdpa import SdpaAttention
from lorax_shard.native import NativeFunction, load_library

_SOURCE = Path(__file__).with_name("decode.cpp")
_STORE_SOURCE = Path(__file__).with_name("store.cpp")
# The fields of StoreCall, in one argument: a call from Python costs by their number.
_PACK_STORE = struct.Struct("=14q").pack
# Query tokens of a row up to which each is computed as a decode row of its own: gathering the
# row's blocks for one call of the library costs more.
_FEW_TOKENS = 10
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = (
    _POINTER, _INT, _INT,  # query and its strides
    _POINTER, _POINTER, _POINTER,  # keys, values, output
    _POINTER, _INT, _POINTER,  # block tables, their stride, lengths
    _INT, _INT, _INT, _INT, _INT, _INT,  # rows, heads, kv heads, key dim, value dim, block size
    _FLOAT, _INT, _INT, _FLOAT, _POINTER, ctypes.c_int,  # scaling, window, chunk, softcap, sinks, threads
)  # fmt: skip


class _QueryTokens(NamedTuple):
    """The tokens that the kernel computes, each as a row of one."""

    num: int
    block_tables: torch.Tensor  # num x max_blocks
    lengths: torch.Tensor  # num; the KV tokens that each sees


class CppAttention(SdpaAttention):
    """Reads each KV block of a token's row where it lies."""

    name = "cpp"

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the kernel cannot be built or loaded here, or None."""
        if device.type != "cpu":
            return f"it computes on a CPU, not on {device.type}"
        if dtype is not torch.float32:
            return f"it computes float32, not {str(dtype).removeprefix('torch.')}"
        return _kernel()[1] or _store()[1]

    @classmethod
    def refuses_cache(cls, kv_dtype: torch.dtype, device: torch.device) -> str | None:  # noqa: ARG003 - whichever it is
        """Return that its kernel reads numbers of one kind."""
        return "its kernel reads float32"

    def _num_decoded(self, metadata: StepMetadata) -> int:
        """Return how many rows the kernel computes: the first ones, each of few tokens."""
        long = (row for row, num in enumerate(metadata.query_lens) if num > _FEW_TOKENS)
        return next(long, len(metadata.query_lens))

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        metadata: StepMetadata,
    ) -> None:
        """Write finite K and V only, as ``sdpa`` does, in one pass."""
        slots = metadata.slots
        keys, values = metadata.cache.keys[layer], metadata.cache.values[layer]
        key, value = _rows_together(key), _rows_together(value)
        num_tokens, num_heads, key_dim = key.shape
        if not (
            key.dtype is value.dtype is keys.dtype is torch.float32
            and slots.dtype is torch.int64
            and slots.is_contiguous()
            and slots.shape == (num_tokens,)
            and (num_heads, key_dim) == keys.shape[2:]
            and value.shape == (num_tokens, num_heads, values.shape[3])
        ):
            raise ValueError(f"K of {tuple(key.shape)} and V of {tuple(value.shape)} do not fit")
        _refuse_missing(metadata, keys.shape[0] * keys.shape[1])
        store, reason = _store()
        assert store is not None, reason  # the registry makes no backend that cannot run
        store(
            _PACK_STORE(
                key.data_ptr(), key.stride(0), key.stride(1), key_dim, keys.data_ptr(),
                value.data_ptr(), value.stride(0), value.stride(1), value.shape[2], values.data_ptr(),
                slots.data_ptr(), keys.shape[0] * keys.shape[1], num_tokens, num_heads,
            )
        )  # fmt: skip

    def _decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> None:
        kernel, reason = _kernel()
        assert kernel is not None, reason  # the registry makes no backend that cannot run
        keys, values = metadata.cache.keys[layer], metadata.cache.values[layer]
        tokens = self._query_tokens(metadata)
        query = _rows_together(query)
        sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
        kernel(
            query.data_ptr(), query.stride(0), query.stride(1),
            keys.data_ptr(), values.data_ptr(), output.data_ptr(),
            tokens.block_tables.data_ptr(), tokens.block_tables.stride(0), tokens.lengths.data_ptr(),
            tokens.num, query.shape[1], keys.shape[2], keys.shape[3],
            values.shape[3], keys.shape[1], spec.scaling, spec.window or 0, spec.chunk or 0,
            spec.softcap or 0.0, None if sinks is None else sinks.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def _query_tokens(self, metadata: StepMetadata) -> _QueryTokens:
        if "cpp.tokens" not in metadata.scratch:
            num_rows = self._num_decoded(metadata)
            metadata.scratch["cpp.tokens"] = _tokens_of_rows(num_rows, metadata)
        tokens: _QueryTokens = metadata.scratch["cpp.tokens"]
        return tokens


def _tokens_of_rows(num_rows: int, metadata: StepMetadata) -> _QueryTokens:
    """Return the tokens of the first rows: each sees those before it, and itself."""
    query_lens = torch.tensor(metadata.query_lens[:num_rows])
    ends = torch.tensor(metadata.context_lens[:num_rows]).repeat_interleave(query_lens)
    num_tokens = len(ends)
    # Of each token: how many of its row come behind it.
    behind = query_lens.cumsum(0).repeat_interleave(query_lens) - torch.arange(num_tokens) - 1
    tables = metadata.block_tables[:num_rows]
    if num_tokens > num_rows:
        tables = tables.repeat_interleave(query_lens, dim=0)
    return _QueryTokens(num_tokens, tables.contiguous(), ends - behind)


def _refuse_missing(metadata: StepMetadata, num_slots: int) -> None:
    """Raise IndexError for a slot that a cache of so many does not have; looks once a step."""
    if "cpp.num_slots" in metadata.scratch:
        return
    metadata.scratch["cpp.num_slots"] = num_slots
    slots = metadata.slots.numpy()
    if len(slots) and not (slots.max() < num_slots and slots.min() >= NO_SLOT):
        missing = next(each for each in slots.tolist() if not NO_SLOT <= each < num_slots)
        raise IndexError(f"the cache has no slot {missing}")


def _rows_together(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last dimension lies without gaps."""
    return x if x.stride(2) == 1 else x.contiguous()


@functools.cache
def _store() -> tuple[NativeFunction | None, str | None]:
    """Return what stores K and V, or None and the reason in words."""
    library, reason = load_library(_STORE_SOURCE)
    if library is None:
        return None, reason
    return NativeFunction(library, "lorax_store"), None


@functools.cache
def _kernel() -> tuple[Callable[..., None] | None, str | None]:
    """Return the kernel, or None and the reason in words."""
    library, reason = load_library(_SOURCE)
    if library is None:
        return None, reason
    function: Any = library.lorax_decode_attention
    function.argtypes, function.restype = _ARGUMENTS, None
    return function, None
