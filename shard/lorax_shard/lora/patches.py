"""What takes a module's forward over while a loaded adapter changes that module.

A patch exists for a module only as long as some slot needs it, and steps aside for steps
without adapters; so neither base rows nor adapters that lack a module pay for it. The
structure of the model, its names and its weights stay untouched.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional

from lorax_shard.linear.packed import PackedLinear, SiblingKernel
from lorax_shard.lora.assignment import Assignment, LoraStep
from lorax_shard.lora.backend import GroupWeights, LoraGroup
from lorax_shard.lora.prepared import EmbeddingChange, LinearChange, VectorChange
from lorax_shard.lora.sites import Site
from lorax_shard.lora.stacked import StackedWeights, are_narrow

_Change = TypeVar("_Change", LinearChange, EmbeddingChange, VectorChange)


class CurrentStep:
    """Holds the step that a model computes now; one per model, shared by its patches."""

    __slots__ = ("step",)

    def __init__(self) -> None:
        self.step: LoraStep | None = None


class ModulePatch(ABC):
    """Takes the forward of one module over while some slot changes it."""

    def __init__(self, site: Site, current: CurrentStep) -> None:
        self.site = site
        # Bit s is set if slot s changes this module.
        self.mask = 0
        # Whether it takes part in steps whose slots are not known.
        self.is_pinned = False
        self._is_shown = False
        self._current = current

    def _base(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the module as its class does."""
        module = self.site.module
        base: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
        return base

    def unload(self, slot: int) -> None:
        """Let a slot's change go; no error if it has none."""
        self._set_mask(self.mask & ~(1 << slot))

    def pin(self, *, pinned: bool) -> None:
        """Take part in steps whose slots are not known, or no more."""
        self.is_pinned = pinned
        self._show()

    def _set_mask(self, mask: int) -> None:
        self.mask = mask
        self._show()

    def _show(self) -> None:
        """Have the module computed here as long as that is needed."""
        is_needed = bool(self.mask) or self.is_pinned
        if is_needed and not self._is_shown:
            self.site.module.forward = self._forward
        elif self._is_shown and not is_needed:
            del self.site.module.forward  # the class's own shows again
        self._is_shown = is_needed

    @abstractmethod
    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the module for whatever step there is."""

    def _takes_part(self, rows: Assignment) -> bool:
        return bool(self.mask & rows.mask) or (rows.is_fixed and self.is_pinned)

    def _check_rows(self, num_rows: int, rows: Assignment) -> None:
        if num_rows != rows.num_rows:
            raise RuntimeError(
                f"{self.site.name} was given {num_rows} rows in a step of {rows.num_rows}"
            )


class Patch(ModulePatch, Generic[_Change]):
    """The changes of one module by slot, computed from its input."""

    def __init__(self, site: Site, current: CurrentStep) -> None:
        super().__init__(site, current)
        self._changes: dict[int, _Change] = {}

    def load(self, slot: int, change: _Change) -> None:
        """Change the module for rows of ``slot``."""
        self._changes[slot] = change
        self._set_mask(self.mask | 1 << slot)

    def unload(self, slot: int) -> None:
        """Let a slot's change go; no error if it has none."""
        self._changes.pop(slot, None)
        super().unload(slot)

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self._current.step
        if step is not None:
            rows = step.logits if self.site.is_head else step.tokens
            if self._takes_part(rows):
                return self.compute(x, rows)
        return self._base(x, *args, **kwargs)

    @abstractmethod
    def compute(self, x: torch.Tensor, rows: Assignment) -> torch.Tensor:
        """Compute the module for a step in which some slot changes it."""


class _Stack(NamedTuple):
    """Siblings whose outputs the base computes as columns of one tensor."""

    columns: tuple[int, ...]  # where each member's begin
    width: int


@dataclass(slots=True)
class _Pass:
    """What the siblings share of one input."""

    shrunk: Any
    # The stacked output to which the parts of all members are added.
    whole: torch.Tensor | None = None


class SharedGroup:
    """The low-rank parts of siblings: shrunk by the first that sees an input, for all.

    Where the base computes all siblings' outputs at once, they are expanded at once too.
    """

    def __init__(self, group: LoraGroup, num_members: int) -> None:
        self._group = group
        self._is_shared = num_members > 1
        self._patches: list[LinearPatch] = []
        self._stack: _Stack | None = None

    def join(self, patch: LinearPatch) -> None:
        """Take the next member's patch."""
        self._patches.append(patch)
        if self._group.is_fused:
            self._stack = _stack_of([each.site.module for each in self._patches])

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Take the matrices of a slot."""
        self._group.load(slot, weights)

    def unload(self, slot: int) -> None:
        """Let the matrices of a slot go."""
        self._group.unload(slot)

    def reserve(self, rank: int) -> None:
        """Fix the grids of launches for adapters of such a rank on every sibling; 0 ends it."""
        widths = [patch.site.widths[1] if rank else 0 for patch in self._patches]
        self._group.reserve(ranks=rank * len(widths), widths=widths)

    def warm_up(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compile whatever a step may ask of the group."""
        sites = [patch.site for patch in self._patches]
        x = torch.zeros(1, sites[0].widths[0], dtype=dtype, device=device)
        outputs: list[tuple[int, tuple[int, ...]]]
        outputs = [(width, (0,)) for width in sorted({site.widths[1] for site in sites})]
        if self._stack is not None:
            outputs.append((self._stack.width, self._stack.columns))
        for width, columns in outputs:
            y = torch.zeros(1, width, dtype=dtype, device=device)
            self._group.warm_up(x, y, columns)

    def add(self, member: int, x: torch.Tensor, y: torch.Tensor, rows: Assignment) -> None:
        """Add a member's low-rank output of input ``x`` to ``y`` (T x out)."""
        found = self._pass(x, rows)
        stack = self._stack
        # Other changes of a sibling's output come before its low-rank part.
        if stack is None or any(patch.has_changes for patch in self._patches):
            self._group.expand(found.shrunk, member, y, rows)
            return
        start = stack.columns[member]
        if found.whole is None:
            shape, strides = (rows.num_rows, stack.width), (y.stride(0), 1)
            found.whole = y.as_strided(shape, strides, y.storage_offset() - start)
            self._group.expand_all(found.shrunk, stack.columns, found.whole, rows)
        elif y.data_ptr() != found.whole[:, start:].data_ptr():
            # The same sibling a second time: the base computed its output anew.
            self._group.expand(found.shrunk, member, y, rows)

    def _pass(self, x: torch.Tensor, rows: Assignment) -> _Pass:
        shared = rows.shared
        # The very same tensor, of the same step: siblings are handed one object.
        if shared is not None and shared[0] is self and shared[1] is x:
            found: _Pass = shared[2]
            return found
        found = _Pass(self._group.shrink(x.reshape(rows.num_rows, -1), rows))
        rows.shared = (self, x, found) if self._is_shared else None
        return found


def _stack_of(modules: list[nn.Module]) -> _Stack | None:
    """Return where the modules' outputs lie in one tensor; None: they are apart."""
    kernels = [module.kernel for module in modules if isinstance(module, PackedLinear)]
    siblings = [kernel for kernel in kernels if isinstance(kernel, SiblingKernel)]
    if len(siblings) < max(2, len(modules)) or len({id(each.group) for each in siblings}) > 1:
        return None
    return _Stack(tuple(each.start for each in siblings), siblings[0].group.width)


class LinearPatch(Patch[LinearChange]):
    """A linear: low-rank parts by group, everything else row by row of the slots that have it."""

    def __init__(self, site: Site, current: CurrentStep, group: SharedGroup, member: int) -> None:
        super().__init__(site, current)
        self._group, self._member = group, member
        # Bit s is set if slot s has a low-rank part here.
        self._low_rank = 0
        # What was made of the weights of the latest step's slots; until a slot changes.
        self._stacked: StackedWeights | None = None
        group.join(self)

    @property
    def has_changes(self) -> bool:
        """Whether some slot changes more than its low-rank part adds."""
        return bool(self._changes)

    def load(self, slot: int, change: LinearChange) -> None:
        """Change the module for rows of ``slot``."""
        self._stacked = None
        super().load(slot, change)

    def load_low_rank(self, slot: int) -> None:
        """Note that the group has a low-rank part of this slot for this member."""
        self._low_rank |= 1 << slot
        self._set_mask(self.mask | 1 << slot)

    def unload(self, slot: int) -> None:
        """Let a slot's change go; no error if it has none."""
        self._low_rank &= ~(1 << slot)
        self._stacked = None
        super().unload(slot)

    def compute(self, x: torch.Tensor, rows: Assignment) -> torch.Tensor:
        """Compute the base for all rows, then change those of the slots."""
        y = self._base(x)
        flat = y.view(-1, y.shape[-1])
        self._check_rows(flat.shape[0], rows)
        if self._changes:
            flat = self._change(x.reshape(rows.num_rows, -1), flat, rows)
        if self._low_rank & rows.mask or rows.is_fixed:
            self._group.add(self._member, x, flat, rows)
        return flat.view(*y.shape[:-1], -1)

    def _change(self, x: torch.Tensor, y: torch.Tensor, rows: Assignment) -> torch.Tensor:
        slots = tuple(slot for slot in rows.slots if slot in self._changes)
        weights = (self._changes[slot].weight for slot in slots)
        width = max((weight.shape[0] for weight in weights if weight is not None), default=0)
        if width > y.shape[1]:
            # Other rows do not have these tokens: their logits stay impossible.
            y = functional.pad(y, (0, width - y.shape[1]), value=float("-inf"))
        if (stacked := self._stack(slots, y.shape[1])) is not None:
            return stacked.compute(x, y, rows)
        for slot in slots:
            _change_rows(self._changes[slot], rows.rows(slot), x, y)
        return y

    def _stack(self, slots: tuple[int, ...], width: int) -> StackedWeights | None:
        """Return the weights of slots as one; None: they are not to be computed so."""
        if self._stacked is None or self._stacked.slots != slots:
            changes = [self._changes[slot] for slot in slots]
            is_one = are_narrow(changes)
            self._stacked = StackedWeights.of(slots, changes, width) if is_one else None
        return self._stacked


def _change_rows(
    change: LinearChange, at: slice | torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> None:
    if change.weight is not None:
        width = change.weight.shape[0]
        y[at, :width] = functional.linear(x[at], change.weight, change.bias)
        y[at, width:] = float("-inf")
    if change.scale is not None:
        y[at, : len(change.scale)] *= change.scale
    if change.shift is not None:
        y[at, : len(change.shift)] += change.shift
    if change.token_ids is not None and change.token_rows is not None:
        columns = x[at] @ change.token_rows.T
        numbers = torch.arange(len(y), device=y.device)[at]
        y[numbers[:, None], change.token_ids] = columns


class EmbeddingPatch(Patch[EmbeddingChange]):
    """An embedding: computed by the base, then changed row by row of the slots."""

    def compute(self, x: torch.Tensor, rows: Assignment) -> torch.Tensor:
        """Compute the embedding of ids ``x``."""
        ids = x.reshape(-1)
        self._check_rows(len(ids), rows)
        changes = [(rows.rows(s), self._changes[s]) for s in rows.slots if s in self._changes]
        known = ids
        if any(change.weight is not None for _, change in changes):
            # The base may not know these ids.
            known = ids.clone()
            for at, change in changes:
                if change.weight is not None:
                    known[at] = 0
        y = self._base(known.view(x.shape))
        flat = y.view(len(ids), -1)
        for at, change in changes:
            flat[at] = _embed(change, ids[at], flat[at])
        return y


def _embed(change: EmbeddingChange, ids: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    y = base if change.weight is None else change.weight[ids]
    if change.token_ids is not None and change.token_rows is not None and len(change.token_ids):
        found = torch.searchsorted(change.token_ids, ids).clamp_(max=len(change.token_ids) - 1)
        is_replaced = change.token_ids[found] == ids
        y = torch.where(is_replaced[:, None], change.token_rows[found], y)
    if change.scale is not None:
        y = y * change.scale
    if change.a is not None and change.b is not None:
        y = y + change.a[ids] @ change.b
    return y


class VectorPatch(Patch[VectorChange]):
    """A norm: computed with other parameters for the rows of the slots."""

    def compute(self, x: torch.Tensor, rows: Assignment) -> torch.Tensor:
        """Compute the norm of ``x`` (1 x T x ..., or T x ...)."""
        y = self._base(x)
        flat_x, flat_y = x, y
        if x.shape[0] == 1 and x.dim() > 2:  # batch, tokens, width
            flat_x, flat_y = x[0], y[0]
        self._check_rows(len(flat_x), rows)
        for slot in rows.slots:
            change = self._changes.get(slot)
            if change is not None:
                at = rows.rows(slot)
                flat_y[at] = self._with(change).forward(flat_x[at])
        return y

    def _with(self, change: VectorChange) -> Any:
        module = copy.copy(self.site.module)
        module._parameters = {**module._parameters, **change.parameters}  # type: ignore[dict-item]
        module.__dict__.pop("forward", None)
        return module
