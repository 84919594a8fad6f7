"""How PEFT lays out the low-rank matrices of parameters, and the normal form that is made of them.

For a parameter with a matrix for each of E experts PEFT keeps A as (E r) x in, expert by expert, and
B as out x (r E), where the experts of each rank lie side by side. It wraps the module that holds the
parameter once for each of its parameters, the last outermost, and names the matrices by the wrapper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lorax_shard.peft.base import BaseDescription, ModuleInfo
from lorax_shard.peft.keys import KeyPart, Parts
from lorax_shard.peft.targets import LowRank, Selection


def under_parameters(parts: Parts, selection: Selection, base: BaseDescription) -> Parts:
    """Return the parts with those of wrapped parameters under the names of these."""
    wrapped: dict[str, list[str]] = {}
    for name, info in base.modules.items():
        if info.is_parameter and name in selection.low_rank:
            wrapped.setdefault(name.rpartition(".")[0], []).append(name)
    moved: dict[str, Mapping[KeyPart, str]] = dict(parts)
    for module, names in wrapped.items():
        for depth, name in enumerate(reversed(names)):
            own = moved.pop(module + ".base_layer" * depth, None)
            if own is not None:
                moved[name] = own
    return moved


def stored_shapes(info: ModuleInfo, chosen: LowRank) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B in PEFT's file."""
    rank, width_in, width_out = chosen.rank, info.in_features, info.out_features
    if info.is_swapped or _is_turned(info, chosen):
        width_in, width_out = width_out, width_in
    each = rank * (info.num_experts or 1)
    return (each, width_in), (width_out, each)


def factors(
    info: ModuleInfo, chosen: LowRank, down: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B as ``ModuleDelta`` has them, of the tensors in PEFT's file; nothing is copied."""
    if info.kind == "experts":
        down = down.reshape(info.num_experts, chosen.rank, -1)
        up = up.reshape(-1, chosen.rank, info.num_experts).permute(2, 0, 1)
    if info.is_swapped or _is_turned(info, chosen):
        return up.transpose(-2, -1), down.transpose(-2, -1)
    return down, up


def _is_turned(info: ModuleInfo, chosen: LowRank) -> bool:
    """Whether PEFT takes the rows of a weight for outputs that are inputs."""
    return chosen.of_parameter and info.kind in ("conv1d", "embedding")
