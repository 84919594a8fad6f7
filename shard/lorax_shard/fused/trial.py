"""Tries a backend before a model is given to it."""

from __future__ import annotations

import torch

from lorax_shard.fused.backend import (
    ElementwiseBackend,
    EncoderElementwise,
    GateFunction,
    LayerNorm,
    RmsNorm,
    Rotation,
    UnaryFunction,
    WeightedNorm,
)
from lorax_shard.fused.forwards import noise
from lorax_shard.fused.reference import TorchElementwise

_TOKENS, _WIDTH = 3, 64
# Largest difference that counts as rounding, in units of the last place.
_UNITS = 16


def failure(backend: ElementwiseBackend, like: torch.Tensor) -> str | None:
    """Return in words what a backend does wrong on a device and in a dtype, or None."""
    try:
        found, expected = _compute(backend, like), _compute(TorchElementwise(), like)
    except Exception as error:  # noqa: BLE001 - what a compiler or a driver raises is not known
        lines = str(error).strip().splitlines()
        return f"its kernels fail ({type(error).__name__}: {lines[0] if lines else 'no words'})"
    for kind, tensor in found.items():
        scale = float(expected[kind].float().abs().max())
        difference = float((tensor.float() - expected[kind].float()).abs().max())
        # Written so that a NaN is refused too.
        if not difference <= _UNITS * torch.finfo(like.dtype).eps * scale:
            return f"its {kind} is {difference:.3g} away from torch's, of {scale:.3g}"
    return None


def _compute(backend: ElementwiseBackend, like: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = noise(_TOKENS, 2 * _WIDTH, like=like)
    left, right = rows.chunk(2, dim=-1)
    heads, angles = rows.view(1, 2, _TOKENS, _WIDTH), noise(1, _TOKENS, _WIDTH, like=like)
    norm = WeightedNorm(RmsNorm(1e-6, 0.0), right[0])
    total, normed = backend.add_norms(left, right, norm, norm)
    assert normed is not None
    turned = backend.rotate(heads, heads, angles, angles, Rotation(False, False))
    computed = {
        "norm": backend.rms_norm(left, norm.weight, norm.norm),
        "sum": total,
        "norm of a sum": normed,
        "gate": backend.gated(left, right, GateFunction.SILU),
        "rotation": torch.cat(turned, dim=1),
    }
    if isinstance(backend, EncoderElementwise):
        whole = LayerNorm(right[0], left[0], 1e-6)
        computed["activation"] = backend.activated(left, UnaryFunction.GELU)
        computed["norm of rows"] = backend.layer_norm(left, right, whole)
    return computed
