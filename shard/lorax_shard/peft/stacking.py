"""The low-rank parts of the linears of experts as one of the parameter that they have become.

The outputs of a parameter are those of its parts, one part after the other, or in turns. Each part
of an expert keeps its own ranks, so that B is zero but for the outputs of the part that a rank
belongs to; experts that are not there, or have smaller ranks, have zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch

from lorax_shard.lora.delta import ModuleDelta
from lorax_shard.peft.base import ModuleInfo


@dataclass(frozen=True, slots=True)
class ExpertLinear:
    """A linear of an expert, or of all of them, in the parameter that it is a part of."""

    parameter: str
    # Which part of the outputs.
    part: int
    # None: of all experts.
    expert: int | None


def num_parts(parameter: str) -> int:
    """Return how many linears a parameter of experts was."""
    return 2 if parameter.endswith(".gate_up_proj") else 1


def stacked(info: ModuleInfo, pieces: Mapping[ExpertLinear, ModuleDelta]) -> ModuleDelta:
    """Return the change of a parameter that the changes of linears are, those of one parameter.

    Where their scalings differ, B is in float32 and has them.
    """
    scalings = {delta.scaling for delta in pieces.values()}
    is_one = len(scalings) == 1
    ranks = _ranks(pieces)
    rank, experts = sum(ranks), info.num_experts
    a = torch.zeros(experts, rank, info.in_features, dtype=_dtype(d.a for d in pieces.values()))
    dtype = _dtype(d.b for d in pieces.values()) if is_one else torch.float32
    b = torch.zeros(experts, info.out_features, rank, dtype=dtype)
    for piece, delta in pieces.items():
        assert delta.a is not None
        assert delta.b is not None
        chosen = slice(None) if piece.expert is None else slice(piece.expert, piece.expert + 1)
        first = sum(ranks[: piece.part])
        own = slice(first, first + delta.rank)
        a[chosen, own] = delta.a
        b[chosen, _outputs(info, piece), own] = (
            delta.b if is_one else delta.b.float() * delta.scaling
        )
    return ModuleDelta(a=a, b=b, scaling=scalings.pop() if is_one else 1.0)


def _ranks(pieces: Mapping[ExpertLinear, ModuleDelta]) -> list[int]:
    """Return the largest rank of each part, over all experts."""
    count = num_parts(next(iter(pieces)).parameter)
    return [
        max((delta.rank for piece, delta in pieces.items() if piece.part == part), default=0)
        for part in range(count)
    ]


def _outputs(info: ModuleInfo, piece: ExpertLinear) -> slice:
    count = num_parts(piece.parameter)
    if info.is_interleaved:
        return slice(piece.part, None, count)
    width = info.out_features // count
    return slice(piece.part * width, (piece.part + 1) * width)


def _dtype(tensors: Iterable[torch.Tensor | None]) -> torch.dtype:
    """Return a type that holds the values of all tensors."""
    types = [tensor.dtype for tensor in tensors if tensor is not None]
    return reduce(torch.promote_types, types)
