"""The ``cpp`` backend: kernels of our own for a CPU; see ``elementwise.cpp`` and ``native``."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import NamedTuple

import torch

from lorax_shard.fused.backend import (
    ElementwiseBackend,
    EncoderElementwise,
    GateFunction,
    LayerNorm,
    RmsNorm,
    Rotation,
    UnaryFunction,
)
from lorax_shard.fused.rows import empty_as, pair_of_rows, with_rows
from lorax_shard.native import NativeFunction, load_library

_SOURCE = Path(__file__).with_name("elementwise.cpp")
# What is computed must not depend on which part of a row the compiler takes in vectors.
_FLAGS = ("-ffp-contract=off",)
# The fields of NormCall, GatedCall, ActivatedCall, LayerNormCall and RotateCall.
_PACK_NORM = struct.Struct("=8q2dq").pack
_PACK_GATED = struct.Struct("=9q").pack
_PACK_ACTIVATED = struct.Struct("=8q").pack
_PACK_LAYER_NORM = struct.Struct("=9qdq").pack
_PACK_ROTATE = struct.Struct("=24q").pack


class _Kernels(NamedTuple):
    rms_norm: NativeFunction
    gated: NativeFunction
    activated: NativeFunction
    layer_norm: NativeFunction
    rotate: NativeFunction


class CppElementwise(ElementwiseBackend, EncoderElementwise):
    """Reads and writes everything once, a call from Python for each operation."""

    name = "cpp"

    def __init__(self) -> None:
        kernels, reason = _kernels()
        assert kernels is not None, reason  # the registry makes no backend that cannot run
        self._kernels = kernels

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the kernels cannot be built or loaded here, or None."""
        if device.type != "cpu":
            return f"it computes on a CPU, not on {device.type}"
        if dtype is not torch.float32:
            return f"it computes float32, not {str(dtype).removeprefix('torch.')}"
        _, reason = _kernels()
        return reason

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """Return the norm; see the interface."""
        _refuse_others(x, weight)
        width = x.shape[-1]
        if weight.dim() != 1 or weight.shape[0] != width:
            raise ValueError(f"a weight of {tuple(weight.shape)} for rows of {width}")
        x, outer, stride, inner, inner_stride = with_rows(x, width)
        if not weight.is_contiguous():
            weight = weight.contiguous()
        if inner > 1 and inner_stride > stride:
            # In the order in which the rows lie: heads of a token stay together.
            outer, stride, inner, inner_stride = inner, inner_stride, outer, stride
            out = x.new_empty(outer, inner, width).transpose(0, 1).view(x.shape)
        else:
            out = empty_as(x)
        self._kernels.rms_norm(
            _PACK_NORM(
                x.data_ptr(), outer, stride, inner, inner_stride, weight.data_ptr(),
                out.data_ptr(), width, norm.epsilon, norm.offset, torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: GateFunction) -> torch.Tensor:
        """Return activation(gate) * up; see the interface."""
        _refuse_others(gate, up)
        if gate.shape != up.shape:
            raise ValueError(f"a gate of {tuple(gate.shape)} for {tuple(up.shape)}")
        width = gate.shape[-1]
        gate, up, rows, gate_stride, up_stride = pair_of_rows(gate, up, width)
        out = empty_as(gate)
        self._kernels.gated(
            _PACK_GATED(
                gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, out.data_ptr(),
                rows, width, activation.value, torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    def activated(
        self, x: torch.Tensor, activation: UnaryFunction, *, in_place: bool = False
    ) -> torch.Tensor:
        """Return the activation of each number; see the interface."""
        _refuse_others(x)
        width = x.shape[-1]
        x, _, rows, stride, _ = pair_of_rows(x, x, width)
        out, out_stride = (x, stride) if in_place else (empty_as(x), width)
        self._kernels.activated(
            _PACK_ACTIVATED(
                x.data_ptr(), stride, out.data_ptr(), out_stride, rows, width, activation.value,
                torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    def layer_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, norm: LayerNorm
    ) -> torch.Tensor:
        """Return the norm of a sum; see the interface."""
        weight, bias = norm.weight, norm.bias
        _refuse_others(*(each for each in (x, delta, weight, bias) if each is not None))
        width = x.shape[-1]
        if weight.shape != (width,) or (bias is not None and bias.shape != (width,)):
            raise ValueError(f"a weight of {tuple(weight.shape)} for rows of {width}")
        if delta is not None and delta.shape != x.shape:
            raise ValueError(f"{tuple(delta.shape)} to add to {tuple(x.shape)}")
        x, added, rows, stride, added_stride = pair_of_rows(x, x if delta is None else delta, width)
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        out = empty_as(x)
        self._kernels.layer_norm(
            _PACK_LAYER_NORM(
                x.data_ptr(), stride, 0 if delta is None else added.data_ptr(), added_stride,
                weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
                rows, width, norm.epsilon, torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    def rotate(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rotation: Rotation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both turned, in memory in the order of what they are made of."""
        _refuse_others(query, key, cos, sin)
        _, _, num_tokens, dim = query.shape
        num_keys, width = key.shape[1], rotation.width(cos.shape[-1])
        if (
            key.shape != (1, num_keys, num_tokens, dim)
            or cos.shape != sin.shape
            or cos.shape[:2] != (1, num_tokens)
            or width > dim
            or width % 2
        ):
            shapes = (tuple(each.shape) for each in (query, key, cos, sin))
            raise ValueError(f"heads and angles do not fit: {', '.join(map(str, shapes))}")
        if num_tokens == 0:
            return query, key
        query, turned, queries = _heads(query)
        key, turned_key, keys = _heads(key)
        cos, sin = (each if each.stride(2) == 1 else each.contiguous() for each in (cos, sin))
        self._kernels.rotate(
            _PACK_ROTATE(
                *queries, *keys,
                cos.data_ptr(), cos.stride(1), sin.data_ptr(), sin.stride(1),
                num_tokens, dim, width, rotation.is_adjacent, rotation.is_by_pair,
                torch.get_num_threads(),
            )
        )  # fmt: skip
        return turned, turned_key


def _heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Return heads whose numbers follow each other, a place for the result, the kernel's fields."""
    _, head_stride, token_stride, last = x.stride()
    if last != 1:
        return _heads(x.contiguous())
    out = torch.empty_like(x)
    _, out_head_stride, out_token_stride, last = out.stride()
    if last != 1:
        return _heads(x.contiguous())
    return x, out, (
        x.data_ptr(), x.shape[1], head_stride, token_stride,
        out.data_ptr(), out_head_stride, out_token_stride,
    )  # fmt: skip


def _refuse_others(*tensors: torch.Tensor) -> None:
    for each in tensors:
        if each.dtype is not torch.float32 or not each.is_cpu:
            raise ValueError(
                f"the kernels compute float32 on a CPU, not {each.dtype}, {each.device}"
            )


@functools.cache
def _kernels() -> tuple[_Kernels | None, str | None]:
    """Return the kernels, or None and the reason in words."""
    library, reason = load_library(_SOURCE, *_FLAGS)
    if library is None:
        return None, reason
    for_rows = {"gated": "lorax_gate_rows"}
    found = (
        NativeFunction(
            library, f"lorax_{name}", is_light=True, is_by_row=True, for_rows=for_rows.get(name, "")
        )
        for name in _Kernels._fields
    )
    return _Kernels(*found), None
