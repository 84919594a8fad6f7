"""Cuts adapters to what one rank holds of the modules that they change.

With y = x W^T + s (x A^T) B^T, a column-parallel linear has some rows of W and takes the same
rows of B with all of A; a row-parallel one has some columns of W and takes the same columns of
A with all of B. Its low-rank output is then a part of the same sum as the base's, and is
summed up with it: adapters need no collective of their own (Sheng et al., "S-LoRA", 2023,
section 6, splits them so that one more is needed).

    column, head    B, its bias, magnitude, bias, weight, token rows by output     A as it is
    row             A and weight by input, biases on rank 0                        B as it is
    norm            weight and bias by feature
    experts         up: B by output; down: A by input, of each expert
    embedding       A, weight and token rows by id                                 B as it is

DoRA divides by the norms of whole rows of W + s B A, and of whole columns in an embedding.
Where a rank has parts of them only, it reads the module's whole weight from disk once, while
the adapter is prepared: ranks never meet outside of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.errors import AdapterMismatchError
from lorax_shard.parallel.partition import Span
from lorax_shard.parallel.plan import RankPlan, Role, Split


class AdapterCut:
    """Knows one rank's part of a model; safe to use from any thread.

    Args:
        read_weight: reads a module's whole weight, in its own layout; None if there is none
            under its name.
        dtype: what the model computes in.
    """

    def __init__(
        self,
        plan: RankPlan,
        read_weight: Callable[[str], torch.Tensor | None],
        dtype: torch.dtype,
    ) -> None:
        self._plan = plan
        self._read_weight = read_weight
        self._dtype = dtype

    def cut(self, adapter: HostAdapter) -> HostAdapter:
        """Return the rank's part of an adapter that fits the whole model."""
        splits = self._plan.splits
        modules = {}
        for name, delta in adapter.modules.items():
            module, _, parameter = name.rpartition(".")
            if module in splits and splits[module].role is Role.EXPERTS:
                modules[name] = _experts(splits[module], parameter, delta)
            else:
                modules[name] = self._cut(name, splits[name], delta) if name in splits else delta
        return dataclasses.replace(adapter, modules=modules)

    def _cut(self, name: str, split: Split, delta: ModuleDelta) -> ModuleDelta:
        if split.role is Role.ROW:
            return self._row(name, split, delta)
        if split.role is Role.EMBEDDING:
            return self._embedding(name, delta)
        if split.role is Role.HEAD:
            return self._head(delta)
        if split.role in (Role.COLUMN, Role.NORM):
            return _column(split, delta)
        return delta

    def _row(self, name: str, split: Split, delta: ModuleDelta) -> ModuleDelta:
        # A row-parallel weight is split by input, in whichever layout.
        return dataclasses.replace(
            delta,
            a=_taken(delta.a, 1, split.spans),
            weight=_taken(delta.weight, split.weight_dim, split.spans),
            # The sum over the ranks has them once.
            bias=delta.bias if self._plan.rank == 0 else None,
            b_bias=delta.b_bias if self._plan.rank == 0 else None,
            norm=self._norm(name, delta, is_transposed=split.is_transposed),
        )

    def _embedding(self, name: str, delta: ModuleDelta) -> ModuleDelta:
        ids, rows = self._tokens(delta)
        return dataclasses.replace(
            delta,
            a=None if delta.a is None else _never_empty(delta.a[:, self._ids], 1),
            weight=None if delta.weight is None else _never_empty(delta.weight[self._ids], 0),
            token_ids=ids,
            token_rows=rows,
            norm=self._norm(name, delta, is_embedding=True),
        )

    def _head(self, delta: ModuleDelta) -> ModuleDelta:
        ids, rows = self._tokens(delta)
        own = self._ids

        def part(whole: torch.Tensor | None) -> torch.Tensor | None:
            return None if whole is None else whole[own]

        return dataclasses.replace(
            delta,
            b=part(delta.b),
            b_bias=part(delta.b_bias),
            magnitude=part(delta.magnitude),
            bias=part(delta.bias),
            weight=part(delta.weight),
            token_ids=ids,
            token_rows=rows,
        )

    @property
    def _ids(self) -> slice:
        """The rank's part of a vocabulary, which an adapter may have made longer or shorter."""
        own = self._plan.vocabulary[self._plan.rank]
        is_last = self._plan.rank == self._plan.world_size - 1
        return slice(own.start, None if is_last else own.stop)

    def _tokens(self, delta: ModuleDelta) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if delta.token_ids is None or delta.token_rows is None:
            return None, None
        own, ids = self._ids, delta.token_ids.long()
        is_own = ids >= own.start
        if own.stop is not None:
            is_own &= ids < own.stop
        if not is_own.any():
            return None, None
        return ids[is_own] - own.start, delta.token_rows[is_own]

    def _norm(
        self,
        name: str,
        delta: ModuleDelta,
        *,
        is_transposed: bool = False,
        is_embedding: bool = False,
    ) -> torch.Tensor | None:
        """Return what DoRA divides by, over the whole module."""
        if delta.magnitude is None or delta.a is None or delta.b is None:
            return None
        weight = delta.weight if delta.weight is not None else self._read_weight(name)
        if weight is None:
            raise AdapterMismatchError(
                f"DoRA on {name!r} needs the module's whole weight, which the model's files do "
                "not have under this name; serve the adapter on one shard"
            )
        # As the model has it, then as it is computed with.
        weight = weight.to(self._dtype).float()
        if is_transposed:
            weight = weight.T
        if delta.token_ids is not None and delta.token_rows is not None:
            weight = weight.index_copy(0, delta.token_ids.long(), delta.token_rows.float())
        change = delta.b.float() @ delta.a.float()
        change = change.T if is_embedding else change
        dim = 0 if is_embedding else 1
        norm: torch.Tensor = torch.linalg.vector_norm(weight + delta.scaling * change, dim=dim)
        return norm


def _experts(split: Split, parameter: str, delta: ModuleDelta) -> ModuleDelta:
    """A rank has a part of each expert's width: what the first product gives, the second reads."""
    spans = split.parameters[parameter][1]
    if parameter == "down_proj":
        return dataclasses.replace(delta, a=_taken(delta.a, 2, spans))
    return dataclasses.replace(delta, b=_taken(delta.b, 1, spans))


def _column(split: Split, delta: ModuleDelta) -> ModuleDelta:
    return dataclasses.replace(
        delta,
        b=_taken(delta.b, 0, split.spans),
        b_bias=_taken(delta.b_bias, 0, split.spans),
        magnitude=_taken(delta.magnitude, 0, split.spans),
        bias=_taken(delta.bias, 0, split.spans),
        weight=_taken(delta.weight, split.weight_dim, split.spans),
    )


def _taken(tensor: torch.Tensor | None, dim: int, spans: tuple[Span, ...]) -> torch.Tensor | None:
    if tensor is None:
        return None
    parts = [tensor.narrow(dim, span.start, len(span)) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _never_empty(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a tensor that can be indexed: ids that a rank does not have read its first row."""
    if tensor.shape[dim]:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = 1
    return tensor.new_zeros(shape)
