"""What an adapter becomes before it is loaded: checked, converted, everything foldable folded in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lorax_shard.lora.backend import ExpertsWeights, GroupWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearChange:
    """What an adapter changes in a linear besides its low-rank part.

    With ``weight``: y = x weight^T + bias, as wide as the weight is. Without: y = y * scale +
    shift. Then the columns ``token_ids`` of y become x token_rows^T.
    """

    weight: torch.Tensor | None = None  # out' x in
    bias: torch.Tensor | None = None  # out'
    scale: torch.Tensor | None = None  # out
    shift: torch.Tensor | None = None  # out
    token_ids: torch.Tensor | None = None  # n
    token_rows: torch.Tensor | None = None  # n x in

    @property
    def is_empty(self) -> bool:
        """Whether nothing changes."""
        return self.nbytes == 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return _nbytes(
            self.weight, self.bias, self.scale, self.shift, self.token_ids, self.token_rows
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingChange:
    """What an adapter changes in an embedding.

    Row t: ``weight``'s or the base's, replaced by ``token_rows`` where ``token_ids`` names t;
    times ``scale``; plus a[t] b. The embedding's own scale is folded into all of them.
    """

    weight: torch.Tensor | None = None  # vocabulary' x dim
    token_ids: torch.Tensor | None = None  # n, ascending
    token_rows: torch.Tensor | None = None  # n x dim
    scale: torch.Tensor | None = None  # dim
    a: torch.Tensor | None = None  # vocabulary' x r
    b: torch.Tensor | None = None  # r x dim

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return _nbytes(self.weight, self.token_ids, self.token_rows, self.scale, self.a, self.b)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorChange:
    """Parameters that take the place of a norm's own."""

    parameters: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.parameters.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedAdapter:
    """An adapter on the model's device, in its dtype; immutable, and of no slot yet."""

    digest: str
    # By the group's number.
    groups: Mapping[int, GroupWeights]
    # By the names of modules, and of parameters that hold a matrix for each expert.
    routers: Mapping[str, GroupWeights] = field(default_factory=dict)
    experts: Mapping[str, ExpertsWeights] = field(default_factory=dict)
    # By module name.
    linears: Mapping[str, LinearChange]
    embeddings: Mapping[str, EmbeddingChange]
    vectors: Mapping[str, VectorChange]
    # How many logits its rows have; 0: as many as the base's.
    num_logits: int
    max_rank: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on the device."""
        parts = (
            self.groups, self.routers, self.experts, self.linears, self.embeddings, self.vectors,
        )  # fmt: skip
        return sum(change.nbytes for part in parts for change in part.values())


def _nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
