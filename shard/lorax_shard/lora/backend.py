"""The interface of LoRA backends.

Shapes in this folder: T rows of a tensor, r rank, R sum of the ranks of the members of a
group, in and out the widths of a linear.

A *group* is one linear, or several siblings that read the same input (q, k and v). For a
row with input x whose adapter has A (r x in) and B (out x r) for a member, that member's
output gains ``(x A^T) B'`` where B' = scaling * B^T. The members' A lie one below the
other, so that one product shrinks the input for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorax_shard.lora.assignment import Assignment, IdArray
from lorax_shard.mixture.pairs import Pairs, ToldFunction


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """The low-rank matrices of one adapter for one group; all contiguous."""

    a: torch.Tensor  # R x in
    # B' of each member: transposed, with what scales it folded in. None: it has none.
    b: tuple[torch.Tensor | None, ...]  # r x out
    # Of each member: what multiplies its output, where B' lacks it. None: no B' does.
    scales: tuple[float, ...] | None = None
    # Whether the numbers of each matrix lie in panels (``panels.h``), whatever its strides say.
    in_panels: bool = False

    @property
    def offsets(self) -> list[int]:
        """Return where in R each member's part begins."""
        offsets, start = [], 0
        for b in self.b:
            offsets.append(start)
            start += 0 if b is None else b.shape[0]
        return offsets

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return self.a.nbytes + sum(b.nbytes for b in self.b if b is not None)


@dataclass(frozen=True, slots=True)
class ExpertsWeights:
    """The low-rank matrices of one adapter for all experts of a stack.

    An expert's A and B' lie one behind the other: what a step reads of it is one piece.
    """

    both: torch.Tensor  # experts x (r * in + r * out)
    width_in: int
    rank: int
    # What multiplies their outputs, where B' lacks it.
    scale: float | None = None

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return self.both.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return self.both.nbytes

    @property
    def a(self) -> torch.Tensor:
        """Each expert's A: experts x r x in."""
        return self.both[:, : self.rank * self.width_in].view(self.num_experts, self.rank, -1)

    @property
    def b(self) -> torch.Tensor:
        """Each expert's B', as in GroupWeights: experts x r x out."""
        return self.both[:, self.rank * self.width_in :].view(self.num_experts, self.rank, -1)

    def of(self, expert: int) -> GroupWeights:
        """Return one expert's matrices."""
        scales = None if self.scale is None else (self.scale,)
        return GroupWeights(self.a[expert], (self.b[expert],), scales)


class LoraGroup(ABC):
    """The loaded low-rank matrices of one group, by slot."""

    # Whether ``expand_all`` does better than ``expand`` for one member after the other.
    is_fused: ClassVar[bool] = False

    @abstractmethod
    def load(self, slot: int, weights: GroupWeights) -> None:
        """Take the matrices of a slot; the slot is empty. The backend's ``commit`` ends it."""

    @abstractmethod
    def unload(self, slot: int) -> None:
        """Let the matrices of a slot go. The backend's ``commit`` ends it."""

    def load_experts(self, first: int, weights: ExpertsWeights) -> None:
        """Take the matrices of as many slots as there are experts, from ``first`` on."""
        for expert in range(weights.num_experts):
            self.load(first + expert, weights.of(expert))

    def unload_experts(self, first: int, count: int) -> None:
        """Let go of what ``load_experts`` took."""
        for slot in range(first, first + count):
            self.unload(slot)

    @abstractmethod
    def shrink(self, x: torch.Tensor, rows: Assignment) -> Any:
        """Compute x A^T for all rows (x: T x in).

        What comes back is for ``expand``, until another group shrinks rows of the same
        assignment.
        """

    @abstractmethod
    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add a member's low-rank output to ``y`` (T x out or wider, any row stride)."""

    def expand_all(
        self, shrunk: Any, columns: tuple[int, ...], y: torch.Tensor, rows: Assignment
    ) -> None:
        """Add the low-rank outputs of all members to ``y`` (T x sum of out, any row stride).

        Those of member i begin at column ``columns[i]``.
        """
        for member, start in enumerate(columns):
            self.expand(shrunk, member, y[:, start:], rows)

    @property
    def told(self) -> ToldFunction | None:
        """What adds the outputs of the only member to a product of pairs when it is there.

        For the pairs that the backend assigned last, or was told of. None: there is nothing native.
        """
        return None

    def reserve(self, *, ranks: int, widths: list[int]) -> None:
        """Fix the grids of launches for slots of so many ranks, and such widths of the members.

        For whoever captures a graph, together with the backend's ``reserve``; 0 ranks end it.
        """
        raise RuntimeError(f"{type(self).__name__} cannot be captured in a graph")

    def warm_up(  # noqa: B027 - where nothing is compiled there is nothing to do
        self, x: torch.Tensor, y: torch.Tensor, columns: tuple[int, ...]
    ) -> None:
        """Compile whatever a step may ask of this group; nothing is computed.

        ``x`` and ``y`` are one row of an input, and of the outputs that ``expand_all`` adds to
        at ``columns``, or of one member's.
        """


class LoraBackend(ABC):
    """Makes groups. Rows whose slot is not loaded in a group stay as they are, free of cost."""

    name: ClassVar[str]
    # Whether groups take matrices of float32, bfloat16 and float16 as adapters have them, with
    # ``scales`` beside them. Others get all in the model's dtype, and no ``scales``.
    keeps_stored: ClassVar[bool] = False
    # The names of the kernels that a CPU's kept steps call for adapters: without these they are
    # those of the base model.
    kernels: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:  # noqa: ARG003 - plain torch runs everywhere
        """Return in words why this backend cannot run here, or None when it can."""
        return None

    @property
    def pack(self) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
        """Return what writes matrices as groups read them fastest, in panels; None: rank by rank.

        It takes one of r x n, with any strides, and a contiguous one of its shape and type.
        """
        return None

    def commit(self, device: torch.device) -> None:  # noqa: B027 - most groups do at once
        """Have what groups loaded and unloaded take effect; once for all groups of a slot."""

    def reserve(self, num_slots: int, device: torch.device) -> None:
        """Have room for slots below ``num_slots``, so that they keep their address."""
        raise RuntimeError(f"the LoRA backend {self.name!r} cannot be captured in a graph")

    @property
    def version(self) -> int:
        """Changes when a graph that was captured before looks in the wrong place for slots."""
        return 0

    def read_slots(self, rows: Assignment, slots: torch.Tensor) -> None:
        """Let ``rows`` have the slots that stand in a device tensor (T int64, -1: base)."""
        raise RuntimeError(f"the LoRA backend {self.name!r} cannot be captured in a graph")

    def write_slots(self, slot_of_row: IdArray) -> None:
        """Have calls kept from a fixed step read these slots next (T int64, -1: base), on a CPU.

        T may be another number than that of the step.
        """
        raise RuntimeError(f"the LoRA backend {self.name!r} does not read slots of the host")

    def another(self) -> LoraBackend:
        """Return a backend of this kind whose slots are others."""
        return type(self)()

    def assign(self, slots: torch.Tensor) -> Assignment:
        """Return rows of these slots (T int64, -1: none), for use until the next are assigned.

        For slots that follow from what a step has computed; may wait for the device.
        """
        return Assignment(slots.cpu().numpy(), slots.device)

    def assign_pairs(self, pairs: Pairs, slots: torch.Tensor, per_slot: int) -> Assignment:
        """Return as rows the pairs of a step, by their tokens' slots (T int64, -1: none).

        As ``assign``: the slot of a pair is its token's slot * per_slot + its expert.
        """
        return self.assign(pairs.numbers(slots, per_slot))

    def told_of_pairs(self, num_pairs: int, per_slot: int) -> ToldFunction | None:
        """Return what is told of a step's pairs as they are made, instead of ``assign_pairs``.

        Then ``told_pairs`` are their rows. None: there is nothing native.
        """
        return None

    @property
    def told_pairs(self) -> Assignment:
        """The rows of the pairs that were told of last; the same object each time."""
        raise RuntimeError(f"the LoRA backend {self.name!r} is told of no pairs")

    @abstractmethod
    def make_group(self, num_members: int) -> LoraGroup:
        """Return an empty group."""
