"""Quantizes a model's linears and puts them into the model, from outside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.linear.interface import LinearKernel
from lorax_shard.linear.quantized.device import DevicePacker, refusal
from lorax_shard.linear.quantized.formats import FP8, INT4, Format, QuantizedWeight, stack
from lorax_shard.linear.quantized.kernel import QuantizedPacker, load_quantized
from lorax_shard.linear.targets import (
    SIBLINGS,
    LinearTarget,
    find_groups,
    find_targets,
    put_kernel,
    put_stacked,
    stacked_bias,
)

logger = logging.getLogger(__name__)

# By a linear's place in the model.
QuantizedWeights = Mapping[str, QuantizedWeight]


class Packer(Protocol):
    """Makes what a linear computes with."""

    def pack(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> LinearKernel:
        """Return the kernel of a weight."""


def quantize(
    model: nn.Module, make: Callable[[torch.Tensor], QuantizedWeight]
) -> dict[str, QuantizedWeight]:
    """Quantize every linear and leave in the model, as plain weights, the numbers that came out.

    An embedding that shares its weight with the head has them too: the model is then what
    transformers computes with the dequantized weights.
    """
    return quantize_each(model, lambda target: make(target.weight))


@torch.no_grad()
def quantize_each(
    model: nn.Module, make: Callable[[LinearTarget], QuantizedWeight | None]
) -> dict[str, QuantizedWeight]:
    """As ``quantize``, by where a linear hangs; those for which None is made stay as they are."""
    weights = {}
    for target in find_targets(model):
        made = make(target)
        if made is not None:
            weights[target.path] = made
            target.weight.copy_(made.dense())
    return weights


@torch.no_grad()
def install_quantized(model: nn.Module, weights: QuantizedWeights) -> int:
    """Replace the linears that have a quantized weight, and return how many bytes more it takes.

    The plain weights are given up, but for one that an embedding uses too. Raises StartupError
    (BACKEND_UNAVAILABLE) where the kernel cannot run.
    """
    targets = [target for target in find_targets(model) if target.path in weights]
    packer = _packer(weights[targets[0].path].format, targets[0].weight)
    num_linears, added = len(targets), 0
    for group in find_groups(targets, SIBLINGS):
        added += _pack(group, weights, packer)
        added -= sum(target.weight.nbytes for target in group if not target.is_tied)
        group.clear()
    formats = sorted({weight.format.name for weight in weights.values()})
    logger.info(
        "%d linears are quantized (%s); their weights take %.0f MB less",
        num_linears,
        ", ".join(formats),
        -added / 1e6,
        extra={"fields": {"event": "quantized", "formats": formats, "bytes": added}},
    )
    return added


def _packer(format_: Format, weight: torch.Tensor) -> Packer:
    """Return what makes kernels of a format where, and for the rows that, a weight is for."""
    if format_ in (FP8, INT4):
        reason = refusal(format_, weight.device, weight.dtype)
        if reason is None:
            return DevicePacker(weight.dtype)
        raise StartupError(f"{reason}; leave --quantize out", ExitCode.BACKEND_UNAVAILABLE)
    library, reason = load_quantized()
    if library is None:
        raise StartupError(
            f"quantized weights need a kernel that cannot be made here: {reason}. Install g++, or "
            "leave --quantize out.",
            ExitCode.BACKEND_UNAVAILABLE,
        )
    return QuantizedPacker(library)


def _pack(group: list[LinearTarget], weights: QuantizedWeights, packer: Packer) -> int:
    """Put the linears of one group in, together if one format holds them; return their bytes."""
    own = [weights[target.path] for target in group]
    together = stack(own) if len(own) > 1 else None
    if together is not None:
        kernel = packer.pack(together, stacked_bias(group))
        put_stacked(group, kernel)
        return kernel.nbytes
    nbytes = 0
    for target, weight in zip(group, own, strict=True):
        kernel = packer.pack(weight, target.bias)
        put_kernel(target, kernel)
        nbytes += kernel.nbytes
    return nbytes
