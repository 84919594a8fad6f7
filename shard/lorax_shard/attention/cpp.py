"""The ``cpp`` backend: decode rows by a kernel of our own, prompts as ``sdpa`` does them.

``decode.cpp`` is compiled for this very CPU when it is first asked for; see ``native``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorax_shard.attention.backend import AttentionSpec, StepMetadata
from lorax_shard.attention.sdpa import SdpaAttention
from lorax_shard.native import load_library

_SOURCE = Path(__file__).with_name("decode.cpp")
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = (
    _POINTER, _INT, _INT,  # query and its strides
    _POINTER, _POINTER, _POINTER,  # keys, values, output
    _POINTER, _INT, _POINTER,  # block tables, their stride, lengths
    _INT, _INT, _INT, _INT, _INT, _INT,  # rows, heads, kv heads, key dim, value dim, block size
    _FLOAT, _INT, _INT, _FLOAT, _POINTER, ctypes.c_int,  # scaling, window, chunk, softcap, sinks, threads
)  # fmt: skip


class CppAttention(SdpaAttention):
    """Reads each KV block of a decode row once, where it lies."""

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
        tables, lengths = _tables_and_lengths(metadata)
        query = query if query.stride(2) == 1 else query.contiguous()
        sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
        kernel(
            query.data_ptr(), query.stride(0), query.stride(1),
            keys.data_ptr(), values.data_ptr(), output.data_ptr(),
            tables.data_ptr(), tables.stride(0), lengths.data_ptr(),
            metadata.num_decode_rows, query.shape[1], keys.shape[2], keys.shape[3],
            values.shape[3], keys.shape[1], spec.scaling, spec.window or 0, spec.chunk or 0,
            spec.softcap or 0.0, None if sinks is None else sinks.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


def _tables_and_lengths(metadata: StepMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    if "cpp.rows" not in metadata.scratch:
        lengths = torch.tensor(metadata.context_lens[: metadata.num_decode_rows])
        metadata.scratch["cpp.rows"] = metadata.block_tables.contiguous(), lengths
    rows: tuple[torch.Tensor, torch.Tensor] = metadata.scratch["cpp.rows"]
    return rows


@functools.cache
def _kernel() -> tuple[Callable[..., None] | None, str | None]:
    """Return the kernel, or None and the reason in words."""
    library, reason = load_library(_SOURCE)
    if library is None:
        return None, reason
    function: Any = library.lorax_decode_attention
    function.argtypes, function.restype = _ARGUMENTS, None
    return function, None
