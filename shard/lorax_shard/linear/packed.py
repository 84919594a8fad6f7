"""The modules that take the place of a model's linears."""

from __future__ import annotations

import torch
from torch import nn

from lorax_shard.linear.interface import LinearKernel


class PackedLinear(nn.Module):
    """A linear whose weight lives in a kernel; takes the place of nn.Linear and Conv1D.

    ``weight`` (out x in) is for readers such as merging and probes: it may have to be made.
    """

    def __init__(
        self, kernel: LinearKernel, in_features: int, out_features: int, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.in_features, self.out_features = in_features, out_features
        # Held by the kernel too; plain attributes, so that .to() cannot part the two.
        self.bias = bias
        # Whether the replaced module kept its weight as in x out (Conv1D): files of it do too.
        self.is_transposed = False

    @property
    def weight(self) -> torch.Tensor:
        """The plain weight, out x in."""
        return self.kernel.dense()

    @property
    def nbytes(self) -> int:
        """Bytes that this linear's weight takes in all its forms."""
        return self.kernel.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # ... x in -> ... x out
        """Compute the linear."""
        return self.kernel(x)

    def extra_repr(self) -> str:
        """Describe it like nn.Linear does."""
        kind = type(self.kernel).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={kind}"


class SiblingGroup:
    """Linears that read the same input, computed by one kernel over their stacked weights.

    The first sibling that sees an input computes all; each other one takes its slice when it
    gets the very same tensor object, once. A sibling that gets another tensor, or the same a
    second time, computes anew, so a step that failed half way leaves nothing to the next one.
    The input must not be changed in place between the calls of one pass.
    """

    def __init__(self, kernel: LinearKernel, sizes: list[int]) -> None:
        self.kernel = kernel
        self._sizes = sizes
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = [None] * len(sizes)

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return what sibling ``index`` makes of ``x``."""
        output = self._outputs[index]
        if self._input is not x or output is None:
            self._outputs = list(torch.split(self.kernel(x), self._sizes, dim=-1))
            self._input, output = x, self._outputs[index]
            assert output is not None  # just filled
        self._outputs[index] = None
        if all(each is None for each in self._outputs):
            self._input = None
        return output

    def start(self, index: int) -> int:
        """Return the column of the stacked output at which a sibling's begin."""
        return sum(self._sizes[:index])

    @property
    def width(self) -> int:
        """Columns of the stacked output."""
        return sum(self._sizes)

    def dense(self, index: int) -> torch.Tensor:
        """Return the plain weight of one sibling."""
        start = self.start(index)
        return self.kernel.dense()[start : start + self._sizes[index]]


class SiblingKernel:
    """One sibling's share of a group, with a linear kernel's face."""

    __slots__ = ("_index", "group", "nbytes")

    def __init__(self, group: SiblingGroup, index: int, nbytes: int) -> None:
        self.group, self._index, self.nbytes = group, index, nbytes

    @property
    def start(self) -> int:
        """The column of the group's output at which this sibling's begin."""
        return self.group.start(self._index)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Take this sibling's columns of the group's result."""
        return self.group.take(self._index, x)

    def dense(self) -> torch.Tensor:
        """Return this sibling's plain weight."""
        return self.group.dense(self._index)
