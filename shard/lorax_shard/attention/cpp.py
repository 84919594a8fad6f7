"""The ``cpp`` backend: few tokens of a row by a kernel of our own, prompts as ``sdpa`` does them.

``decode.cpp`` is compiled for this very CPU when it is first asked for; see ``native``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorax_shard.attention.backend import AttentionSpec, StepMetadata
from lorax_shard.attention.sdpa import SdpaAttention
from lorax_shard.native import load_library

_SOURCE = Path(__file__).with_name("decode.cpp")
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
        _, reason = _kernel()
        return reason

    @classmethod
    def refuses_cache(cls, kv_dtype: torch.dtype, device: torch.device) -> str | None:  # noqa: ARG003 - whichever it is
        """Return that its kernel reads numbers of one kind."""
        return "its kernel reads float32"

    def _num_decoded(self, metadata: StepMetadata) -> int:
        """Return how many rows the kernel computes: the first ones, each of few tokens."""
        long = (row for row, num in enumerate(metadata.query_lens) if num > _FEW_TOKENS)
        return next(long, len(metadata.query_lens))

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
        query = query if query.stride(2) == 1 else query.contiguous()
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


@functools.cache
def _kernel() -> tuple[Callable[..., None] | None, str | None]:
    """Return the kernel, or None and the reason in words."""
    library, reason = load_library(_SOURCE)
    if library is None:
        return None, reason
    function: Any = library.lorax_decode_attention
    function.argtypes, function.restype = _ARGUMENTS, None
    return function, None
