"""The ``triton`` backend: one launch for each norm, gate and pair of rotations."""

from __future__ import annotations

import math
import os

import torch
import triton

from lorax_shard.fused.backend import (
    ElementwiseBackend,
    GateFunction,
    RmsNorm,
    Rotation,
    WeightedNorm,
)
from lorax_shard.fused.rows import empty_as, pair_of_rows, with_rows
from lorax_shard.fused.triton import kernels

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Bytes that a thread reads at once.
_VECTOR_BYTES = 16
_GATED_BLOCK = 1024


class TritonElementwise(ElementwiseBackend):
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
        outs = [torch.empty_like(each) for each in (query, key)]
        strides = [each.stride()[1:3] for each in (query, outs[0], key, outs[1])]
        width = rotation.width(cos.shape[-1])
        kernels.rotate[(num_tokens, num_queries + key.shape[1])](
            query, outs[0], num_queries, *strides[0], *strides[1],
            key, outs[1], *strides[2], *strides[3],
            cos, cos.stride(1), sin, sin.stride(1),
            dim=dim, width=width, is_adjacent=rotation.is_adjacent, is_by_pair=rotation.is_by_pair,
            block=triton.next_power_of_2(width // 2),
            rest_block=triton.next_power_of_2(max(1, dim - width)),
            unit=_unit(query, *(number for pair in strides for number in pair)), num_warps=1,
        )  # fmt: skip
        return outs[0], outs[1]


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
