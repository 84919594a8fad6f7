"""The ``triton`` backend: one launch for each norm, gate and pair of rotations."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton

from lorax_shard.fused.backend import (
    ElementwiseBackend,
    GateFunction,
    KVSlots,
    PendingRotation,
    RmsNorm,
    RotatingStore,
    Rotation,
    WeightedNorm,
)
from lorax_shard.fused.rows import empty_as, pair_of_rows, with_rows
from lorax_shard.fused.triton import kernels, store_kernel

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Bytes that a thread reads at once.
_VECTOR_BYTES = 16
_GATED_BLOCK = 1024


class TritonElementwise(ElementwiseBackend, RotatingStore):
    """Needs a GPU; on a CPU it runs in Triton's interpreter, which is for tests."""

    name = "triton"
    adds_with_norms = True

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why it cannot run here, or None."""
        if dtype not in _DTYPES:
            return f"it does not compute {str(dtype).removeprefix('torch.')}"
        if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"it computes on a GPU, not on {device.type}"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """Return the norm; see the interface."""
        width = x.shape[-1]
        x, outer, stride, inner, inner_stride = with_rows(x, width)
        out = empty_as(x)
        if x.numel():
            block = triton.next_power_of_2(width)
            kernels.rms_norm[(outer * inner,)](
                x, inner, stride, inner_stride, weight.contiguous(), out,
                norm.epsilon, norm.offset,
                width=width, block=block, rounds_first=norm.rounds_first,
                unit=_unit(x, stride, inner_stride), num_warps=_num_warps(block),
            )  # fmt: skip
        return out

    def add_norms(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        inner: WeightedNorm | None,
        outer: WeightedNorm | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sum and its norm; see the interface."""
        width = x.shape[-1]
        x, delta, rows, x_stride, delta_stride = pair_of_rows(x, delta, width)
        total, normed = empty_as(x), None if outer is None else empty_as(x)
        if x.numel():
            block = triton.next_power_of_2(width)
            kernels.add_norms[(rows,)](
                x, x_stride, delta, delta_stride, total, total if normed is None else normed,
                *_weighted(inner, x), *_weighted(outer, x),
                width=width, block=block,
                has_inner=inner is not None,
                inner_rounds_first=inner is not None and inner.norm.rounds_first,
                has_outer=outer is not None,
                outer_rounds_first=outer is not None and outer.norm.rounds_first,
                unit=_unit(x, x_stride, delta_stride), num_warps=_num_warps(block),
            )  # fmt: skip
        return total, normed

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: GateFunction) -> torch.Tensor:
        """Return activation(gate) * up; see the interface."""
        width = gate.shape[-1]
        gate, up, rows, gate_stride, up_stride = pair_of_rows(gate, up, width)
        out = empty_as(gate)
        if gate.numel():
            block = min(_GATED_BLOCK, triton.next_power_of_2(width))
            kernels.gated[(rows, triton.cdiv(width, block))](
                gate, gate_stride, up, up_stride, out,
                width=width, block=block, is_silu=activation is GateFunction.SILU,
                unit=_unit(gate, gate_stride, up_stride, width), num_warps=_num_warps(block),
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
        _, num_queries, num_tokens, dim = query.shape
        if num_tokens == 0:
            return query, key
        query, key, cos, sin = (
            each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, cos, sin)
        )
        heads = _Heads(query, key)
        kernels.rotate[(num_tokens, num_queries + key.shape[1])](
            *heads.told, cos, cos.stride(1), sin, sin.stride(1),
            **_widths(dim, cos, rotation), unit=heads.unit, num_warps=1,
        )  # fmt: skip
        return heads.outs

    def rotate_and_store(
        self, pending: PendingRotation, value: torch.Tensor, kept: KVSlots
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both turned, and keep K and V; see the interface."""
        _, num_queries, num_tokens, dim = pending.query.shape
        if num_tokens == 0:
            return pending.query, pending.key
        query, key, value, cos, sin = (
            each if each.stride(-1) == 1 else each.contiguous()
            for each in (pending.query, pending.key, value, pending.cos, pending.sin)
        )
        heads, value_dim, num_keys = _Heads(query, key), value.shape[3], key.shape[1]
        value_strides = value.stride()[1:3]
        store_kernel.rotate_and_store[(num_tokens, num_queries + num_keys)](
            *heads.told, value, *value_strides, cos, cos.stride(1), sin, sin.stride(1),
            kept.keys, kept.values, kept.slots, num_keys,
            value_dim=value_dim, value_block=triton.next_power_of_2(value_dim),
            **_widths(dim, cos, pending.rotation),
            unit=heads.unit, value_unit=_unit(value, *value_strides), num_warps=1,
        )  # fmt: skip
        return heads.outs


class _Heads:
    """Queries and keys, and what becomes of them, as kernels are told of them."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        self.outs = torch.empty_like(query), torch.empty_like(key)
        pairs = tuple(zip((query, key), self.outs, strict=True))
        queries, keys = ((*each.stride()[1:3], *out.stride()[1:3]) for each, out in pairs)
        self.told = (*pairs[0], query.shape[1], *queries, *pairs[1], *keys)
        self.unit = _unit(query, *queries, *keys)


def _widths(dim: int, cos: torch.Tensor, rotation: Rotation) -> dict[str, Any]:
    """Return the constants of a kernel that turns heads."""
    width = rotation.width(cos.shape[-1])
    return {
        "dim": dim,
        "width": width,
        "is_adjacent": rotation.is_adjacent,
        "is_by_pair": rotation.is_by_pair,
        "block": triton.next_power_of_2(width // 2),
        "rest_block": triton.next_power_of_2(max(1, dim - width)),
    }


def _weighted(
    norm: WeightedNorm | None, anything: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """Return what the kernel is told of a norm."""
    if norm is None:
        return anything, 0.0, 0.0
    return norm.weight.contiguous(), norm.norm.epsilon, norm.norm.offset


def _unit(x: torch.Tensor, *numbers: int) -> int:
    """Return how many elements at once rows that begin at multiples of ``numbers`` can be read."""
    return math.gcd(_VECTOR_BYTES // x.element_size(), *numbers)


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))
