"""What a model does between the kernels of other rooms, as kernels; see ``operations.cpp``.

``as_native`` knows operations of torch that can be one. The bits are torch's own.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorax_shard.native import NativeFunction, load_library

_SOURCE = Path(__file__).with_name("operations.cpp")
# A product and a sum round apart, as they do in torch.
_FLAGS = ("-ffp-contract=off",)
_PACK_ADD = struct.Struct("=5q").pack
_PACK_SCALE = struct.Struct("=2qd2q").pack
_PACK_MULTIPLY = struct.Struct("=8q").pack
_PACK_GATHER = struct.Struct("=7q").pack

_aten = torch.ops.aten


class Operations(NamedTuple):
    """The kernels; ``run`` calls a list of kernels by one team."""

    run: Any
    add: NativeFunction
    scale: NativeFunction
    multiply: NativeFunction
    gather: NativeFunction


class NativeCall(NamedTuple):
    """An operation as a kernel: its result, and what writes it."""

    out: torch.Tensor
    function: NativeFunction
    fields: bytes


@functools.cache
def operations() -> tuple[Operations | None, str | None]:
    """Return the kernels, or None and the reason in words."""
    library, reason = load_library(_SOURCE, *_FLAGS)
    if library is None:
        return None, reason
    run: Any = library.lorax_run
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    run.argtypes, run.restype = (pointer, pointer, pointer, number, pointer, number, pointer), None
    names = [f"lorax_{name}" for name in Operations._fields[1:]]
    found = (NativeFunction(library, name, is_light=True, is_by_row=True) for name in names)
    return Operations(run, *found), None


def as_native(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NativeCall | None:
    """Return an operation of torch as a kernel; None: it is none of those."""
    known, _ = operations()
    if known is None:
        return None
    if function is _aten.add.Tensor and not kwargs:
        return _add(known, *args)
    if function is _aten.mul.Tensor and not kwargs:
        return (_multiply if isinstance(args[1], torch.Tensor) else _scale)(known, *args)
    if function is _aten.index.Tensor and not kwargs:
        return _gather(known, *args)
    return None


def _add(known: Operations, a: torch.Tensor, b: Any) -> NativeCall | None:
    if not (_is_plain(a) and _is_plain(b) and a.shape == b.shape):
        return None
    out = torch.empty_like(a)
    fields = _PACK_ADD(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel(), 1)
    return NativeCall(out, known.add, fields)


def _scale(known: Operations, a: torch.Tensor, factor: Any) -> NativeCall | None:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not _is_plain(a):
        return None
    out = torch.empty_like(a)
    fields = _PACK_SCALE(a.data_ptr(), out.data_ptr(), factor, a.numel(), 1)
    return NativeCall(out, known.scale, fields)


def _multiply(known: Operations, a: torch.Tensor, b: torch.Tensor) -> NativeCall | None:
    """Multiply rows of 1 x T x width, which may be parts of wider ones."""
    is_known = a.shape == b.shape and all(
        _is_float(each) and each.dim() == 3 and each.shape[0] == 1 and each.stride(2) == 1
        for each in (a, b)
    )
    if not is_known:
        return None
    out = a.new_empty(a.shape)
    fields = _PACK_MULTIPLY(
        a.data_ptr(), a.stride(1), b.data_ptr(), b.stride(1), out.data_ptr(), *a.shape[1:], 1
    )
    return NativeCall(out, known.multiply, fields)


def _gather(known: Operations, x: torch.Tensor, indices: list[Any]) -> NativeCall | None:
    """Take rows of the last dimension but one of 1 x T x width."""
    *ahead, rows = indices
    is_known = (
        x.dim() == 3
        and x.shape[0] == 1
        and _is_float(x)
        and x.stride(2) == 1
        and len(ahead) == 1
        and ahead[0] is None
        and isinstance(rows, torch.Tensor)
        and rows.dtype is torch.int64
        and rows.dim() == 1
        and rows.is_contiguous()
    )
    if not is_known:
        return None
    out = x.new_empty(1, len(rows), x.shape[2])
    fields = _PACK_GATHER(
        x.data_ptr(), x.stride(1), rows.data_ptr(), out.data_ptr(), len(rows), x.shape[2], 1
    )
    return NativeCall(out, known.gather, fields)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype is torch.float32 and x.is_cpu


def _is_plain(x: Any) -> bool:
    return _is_float(x) and x.is_contiguous()
