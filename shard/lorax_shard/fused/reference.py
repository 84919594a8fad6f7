"""The ``torch`` backend: the specification of the others, in plain operations."""

from __future__ import annotations

import torch
from torch.nn import functional

from lorax_shard.fused.backend import (
    ElementwiseBackend,
    EncoderElementwise,
    GateFunction,
    LayerNorm,
    RmsNorm,
    Rotation,
    UnaryFunction,
)


class TorchElementwise(ElementwiseBackend, EncoderElementwise):
    """Any device, any dtype; by this name a model keeps its own code, which does the same."""

    name = "torch"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """Compute in float32 and round where the norm says."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.epsilon)
        if norm.rounds_first:
            wide = wide.to(x.dtype).float()
        return (wide * (norm.offset + weight.float())).to(x.dtype)

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: GateFunction) -> torch.Tensor:
        """Compute by the functions of torch."""
        if activation is GateFunction.SILU:
            return functional.silu(gate) * up
        return functional.gelu(gate, approximate="tanh") * up

    def activated(
        self,
        x: torch.Tensor,
        activation: UnaryFunction,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Compute by the functions of torch."""
        return functional.gelu(
            x, approximate="tanh" if activation is UnaryFunction.GELU_TANH else "none"
        )

    def layer_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, norm: LayerNorm
    ) -> torch.Tensor:
        """Compute by the functions of torch."""
        total = x if delta is None else x + delta
        return functional.layer_norm(total, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)

    def rotate(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rotation: Rotation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn queries and keys pair by pair."""
        turned = (_rotated(each, cos, sin, rotation) for each in (query, key))
        return next(turned), next(turned)


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation: Rotation
) -> torch.Tensor:
    width = rotation.width(cos.shape[-1])
    half = width // 2
    evens = torch.arange(0, width, 2) if rotation.is_adjacent else torch.arange(half)
    odds = evens + (1 if rotation.is_adjacent else half)
    # Which cosine each of a pair takes.
    first, second = (torch.arange(half),) * 2 if rotation.is_by_pair else (evens, odds)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x[..., evens], x[..., odds]
    result = x.clone()
    result[..., evens] = a * cos[..., first] - b * sin[..., first]
    result[..., odds] = b * cos[..., second] + a * sin[..., second]
    return result
