"""The ``cpp`` and ``tiles`` backends: attention of all rows of a step in one call of our own kernel.

``attend.cpp`` and ``store.cpp`` are compiled for this very CPU when they are first asked for;
see ``native``.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.attention.backend import (
    AttentionBackend,
    AttentionSpec,
    ReusableRows,
    StepMetadata,
)
from lorax_shard.attention.kv_cache import NO_SLOT
from lorax_shard.native import NativeFunction, load_library

IdArray = NDArray[np.int64]

_SOURCE = Path(__file__).with_name("attend.cpp")
_STORE_SOURCE = Path(__file__).with_name("store.cpp")
# The fields of StoreCall, in one argument: a call from Python costs by their number.
_PACK_STORE = struct.Struct("=14q").pack
# Those of AttendCall.
_ROWS = "cpp.rows"
# The lists of C++'s StepRows: a number for each row.
_NUM_LISTS = 5
NO_BIAS = (0,) * 10
PACK_ATTEND = struct.Struct("=14qd2qd13q").pack


class StepRows(ReusableRows):
    """What the kernel is told of a step's rows, at an address that stays the same.

    Calls that were packed for one step so serve another one, of other rows.
    """

    def __init__(self) -> None:
        # Number of rows, addresses of lists, that of the block tables, and their stride.
        self._fields = np.zeros(_NUM_LISTS + 3, dtype=np.int64)
        self._lists = np.zeros((_NUM_LISTS, 0), dtype=np.int64)
        self._tables: torch.Tensor | None = None

    @property
    def address(self) -> int:
        """Where the fields of C++'s StepRows lie."""
        return int(self._fields.ctypes.data)

    def fill(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: torch.Tensor | None,
    ) -> None:
        """Tell of another step; the tables are read where they lie, until the next call.

        None: K and V are in no cache.
        """
        num_rows = len(query_lens)
        if block_tables is not None and not (
            block_tables.dtype is torch.int64
            and block_tables.shape[0] >= num_rows == len(context_lens)
            and block_tables.stride(1) == 1
        ):
            raise ValueError(
                f"block tables of {tuple(block_tables.shape)} do not fit {num_rows} rows"
            )
        lens, contexts = np.array(query_lens, np.int64), np.array(context_lens, np.int64)
        self._tell(lens, contexts, contexts - lens, lens.cumsum() - lens, block_tables)

    def narrow(self, rows: IdArray, query_lens: IdArray, positions: IdArray) -> None:
        """Tell of some tokens alone of the step; see the interface."""
        _, _, contexts, _, first_keys = self._lists
        tables = None if self._tables is None else self._tables[torch.from_numpy(rows)]
        # In a cache a token sees itself last.
        ends = contexts[rows] if tables is None else positions + query_lens
        self._tell(query_lens, ends, positions, first_keys[rows], tables)

    def _tell(
        self,
        lens: IdArray,
        contexts: IdArray,
        positions: IdArray,
        first_keys: IdArray,
        tables: torch.Tensor | None,
    ) -> None:
        num_rows = len(lens)
        if self._lists.shape[1] < num_rows:
            self._lists = np.zeros((_NUM_LISTS, 2 * num_rows), dtype=np.int64)
        told = (lens, lens.cumsum() - lens, contexts, positions, first_keys)
        for own, each in zip(self._lists, told, strict=True):
            own[:num_rows] = each
        self._tables = tables
        at = (0, 0) if tables is None else (tables.data_ptr(), tables.stride(0))
        self._fields[:] = (num_rows, *(own.ctypes.data for own in self._lists), *at)

    def scratch(self) -> dict[str, Any]:
        """Return itself, where the first layer would put its own."""
        return {_ROWS: self}


class CppAttention(AttentionBackend):
    """Reads K and V where they lie in the cache, once for all query heads that share them.

    What a token gets is the same to the last bit whatever comes beside it, in chunks of any
    size, on any number of threads.
    """

    name = "cpp"
    _function = "lorax_attend"

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the kernel cannot be built or loaded here, or None."""
        if device.type != "cpu":
            return f"it computes on a CPU, not on {device.type}"
        if dtype is not torch.float32:
            return f"it computes float32, not {str(dtype).removeprefix('torch.')}"
        return _library()[1] or _store()[1]

    @classmethod
    def refuses_cache(cls, kv_dtype: torch.dtype, device: torch.device) -> str | None:  # noqa: ARG003 - whichever it is
        """Return that its kernel reads numbers of one kind."""
        return "its kernel reads float32"

    def reusable_rows(self) -> StepRows:
        """Return rows at an address that stays the same."""
        return StepRows()

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        metadata: StepMetadata,
    ) -> None:
        """Write finite K and V only, in one pass: a masked slot is multiplied by zero, and 0 x NaN is NaN."""
        slots = metadata.slots
        keys, values = metadata.cache.keys[layer], metadata.cache.values[layer]
        key, value = numbers_together(key), numbers_together(value)
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

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> torch.Tensor:
        """Return the attention of all rows, decodes and prompts alike."""
        kernel = attend_kernel(self._function)
        keys, values = metadata.cache.keys[layer], metadata.cache.values[layer]
        query = numbers_together(query)
        num_tokens, num_heads, key_dim = query.shape
        _, block_size, num_kv_heads, value_dim = values.shape
        output = query.new_empty(num_tokens, num_heads, value_dim)
        sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
        kernel(
            PACK_ATTEND(
                query.data_ptr(), query.stride(0), query.stride(1),
                keys.data_ptr(), values.data_ptr(), num_kv_heads * key_dim, num_kv_heads * value_dim,
                output.data_ptr(), num_heads * value_dim,
                num_heads, num_kv_heads, key_dim, value_dim, block_size,
                spec.scaling, spec.window or 0, spec.chunk or 0, spec.softcap or 0.0,
                0 if sinks is None else sinks.data_ptr(),
                torch.get_num_threads(), _rows_of(metadata).address, *NO_BIAS,
            )
        )  # fmt: skip
        return output


class TileAttention(CppAttention):
    """The same, with the rows of prompts on matrix tiles (AMX); see ``tile_products.h``.

    Heads of other than multiples of 32 numbers are computed as ``cpp`` does. What a token gets is the same to the last bit among many rows that share their K and V, and
    among few.
    """

    name = "tiles"
    _function = "lorax_attend_on_tiles"

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs what ``cpp`` needs, and a processor with matrix tiles for bfloat16."""
        if reason := super().probe(device, dtype):
            return reason
        library, _ = _library()
        has_tiles: Any = getattr(library, "lorax_attention_has_tiles", None)
        if has_tiles is None or not has_tiles():
            return "this processor has no matrix tiles (AMX), or the system does not grant them"
        return None


def _rows_of(metadata: StepMetadata) -> StepRows:
    """Return what the kernel is told of the rows; made in the first layer of a step."""
    if _ROWS not in metadata.scratch:
        rows = StepRows()
        rows.fill(metadata.query_lens, metadata.context_lens, metadata.block_tables)
        metadata.scratch[_ROWS] = rows
    found: StepRows = metadata.scratch[_ROWS]
    return found


def _refuse_missing(metadata: StepMetadata, num_slots: int) -> None:
    """Raise IndexError for a slot that a cache of so many does not have; looks once a step."""
    if "cpp.num_slots" in metadata.scratch:
        return
    metadata.scratch["cpp.num_slots"] = num_slots
    slots = metadata.slots.numpy()
    if len(slots) and not (slots.max() < num_slots and slots.min() >= NO_SLOT):
        missing = next(each for each in slots.tolist() if not NO_SLOT <= each < num_slots)
        raise IndexError(f"the cache has no slot {missing}")


def numbers_together(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last dimension lies without gaps."""
    return x if x.stride(2) == 1 else x.contiguous()


@functools.cache
def _store() -> tuple[NativeFunction | None, str | None]:
    """Return what stores K and V, or None and the reason in words."""
    library, reason = load_library(_STORE_SOURCE)
    if library is None:
        return None, reason
    return NativeFunction(library, "lorax_store", is_light=True), None


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """Return what attends, or None and the reason in words."""
    return load_library(_SOURCE)


@functools.cache
def attend_kernel(name: str, of_all: frozenset[int] = frozenset()) -> NativeFunction:
    """Return one of its functions; see ``NativeFunction``: K and V of no cache are those of all."""
    library, reason = _library()
    assert library is not None, reason  # the registry makes no backend that cannot run
    return NativeFunction(library, name, is_by_row=True, of_all=of_all)
