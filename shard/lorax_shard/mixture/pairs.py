"""Pairs of a token and one of its experts, and the products that they take part in.

T tokens go to k experts each; their T * k pairs lie expert by expert, those of an expert in the
order of their tokens. ``TorchPairs`` computes them by torch's operations, on any device;
``CpuPairs`` by a kernel of our own, in float32 on a CPU, with matrices of 32 or 16 bits.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from lorax_shard.native import load_library
from lorax_shard.numbers import TYPES

_SOURCE = Path(__file__).with_name("experts.cpp")
# The fields of PairsCall, ProductCall and CombineCall.
_PAIRS_FIELDS = struct.Struct("=11q").pack
_PRODUCT_FIELDS = struct.Struct("=14q").pack
_COMBINE_FIELDS = struct.Struct("=8q").pack


class ToldFunction(NamedTuple):
    """A native function that is told what was made (``told.h``): its address, and of what is its own."""

    function: int
    own: int


# None.
_NOBODY = ToldFunction(0, 0)


class Addition(Protocol):
    """What is added to the product of some pairs."""

    @property
    def told(self) -> ToldFunction | None:
        """What adds to the product, in all threads of the team that makes it; None: ``add`` does."""

    def add(self, x: torch.Tensor, tokens: torch.Tensor | None, y: torch.Tensor) -> None:
        """Add to ``y`` now.

        Row i of the product (pairs x out) has the input x[tokens[i]], without ``tokens`` x[i].
        """


class Additions(Protocol):
    """What is added to the products of a step's pairs."""

    @property
    def slots(self) -> torch.Tensor:
        """Of the step's tokens (T int64, contiguous)."""

    def told(self, num_pairs: int) -> ToldFunction | None:
        """Return what is told of the pairs as soon as they are made, if it can be native."""

    def of(self, pairs: Pairs) -> Mapping[str, Addition]:
        """Return what is added to products, by the names of their parameters."""


class Pairs(ABC):
    """The pairs of one step at one block of experts."""

    # Whether what is added to their products was told of them when they were made.
    is_told = False

    def __init__(self, experts: torch.Tensor, tokens: torch.Tensor, ends: torch.Tensor) -> None:
        # Of each pair, and where those of each expert end.
        self.experts, self.tokens, self.ends = experts, tokens, ends

    def numbers(self, slots: torch.Tensor, per_slot: int) -> torch.Tensor:
        """Return slot * per_slot + expert of each pair, by its token's slot (T int64); -1: none."""
        of_pairs = slots[self.tokens]
        return torch.where(of_pairs < 0, -1, of_pairs * per_slot + self.experts)

    @abstractmethod
    def multiply(
        self,
        x: torch.Tensor,
        tokens: torch.Tensor | None,
        weight: torch.Tensor,
        add: Addition | None = None,
        *,
        in_first: bool,
    ) -> torch.Tensor:
        """Multiply each pair's input with its expert's matrix, and add to it: pairs x out.

        The input of pair i is x[tokens[i]], without ``tokens`` x[i]. ``weight`` is experts x in x
        out with ``in_first``, else experts x out x in.
        """

    @abstractmethod
    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum what each token's pairs made (pairs x out), weighted (T x k): T x out."""


class TorchPairs(Pairs):
    """Computed by torch's grouped product."""

    def __init__(self, chosen: torch.Tensor, num_experts: int) -> None:
        """Sort tokens by the experts that they go to (T x k)."""
        experts, self._order = torch.sort(chosen.reshape(-1), stable=True)
        counts = torch.bincount(experts, minlength=num_experts)
        ends = counts.cumsum(0, dtype=torch.int32)
        super().__init__(experts, self._order // chosen.shape[1], ends)

    def multiply(
        self,
        x: torch.Tensor,
        tokens: torch.Tensor | None,
        weight: torch.Tensor,
        add: Addition | None = None,
        *,
        in_first: bool,
    ) -> torch.Tensor:
        """Gather the inputs first, then compute all experts in one call."""
        x, weight = x if tokens is None else x[tokens], weight.to(x.dtype)
        y: torch.Tensor = functional.grouped_mm(
            x, weight if in_first else weight.mT, offs=self.ends
        )
        if add is not None:
            add.add(x, None, y)
        return y

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Bring the pairs back to the order of tokens and sum them."""
        order = self._order
        y = y * weights.reshape(-1)[order, None]
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return y[places].view(*weights.shape, y.shape[1]).sum(1)


class CpuPairs(Pairs):
    """Computed by ``experts.cpp``: each matrix is read where it lies, once for all its rows.

    What a pair gets is the same to the last bit whatever pairs come beside it.
    """

    def __init__(
        self, chosen: torch.Tensor, num_experts: int, add: Additions | None = None
    ) -> None:
        """Sort tokens by the experts that they go to (T x k), and tell what will be added."""
        (num_tokens, k), chosen = chosen.shape, chosen.to(torch.int64).contiguous()
        ends = torch.empty(num_experts, dtype=torch.int64)
        experts, tokens, self._places = torch.empty(3, num_tokens * k, dtype=torch.int64).unbind()
        super().__init__(experts, tokens, ends)
        told = None if add is None else add.told(num_tokens * k)
        self.is_told = told is not None
        function, own = told or _NOBODY
        _library().pairs(
            _PAIRS_FIELDS(
                chosen.data_ptr(), num_tokens, k, num_experts, ends.data_ptr(),
                tokens.data_ptr(), experts.data_ptr(), self._places.data_ptr(),
                function, 0 if add is None else add.slots.data_ptr(), own,
            )
        )  # fmt: skip

    def multiply(
        self,
        x: torch.Tensor,
        tokens: torch.Tensor | None,
        weight: torch.Tensor,
        add: Addition | None = None,
        *,
        in_first: bool,
    ) -> torch.Tensor:
        """Read inputs where they lie; what is native is added by the same threads."""
        x = x if x.stride(1) == 1 else x.contiguous()
        num_experts, one, other = weight.shape
        num_in, num_out = (one, other) if in_first else (other, one)
        y = torch.empty(len(self.experts), num_out)
        then, own = (None if add is None else add.told) or _NOBODY
        _library().product(
            _PRODUCT_FIELDS(
                x.data_ptr(), x.stride(0), 0 if tokens is None else tokens.data_ptr(),
                weight.data_ptr(), TYPES[weight.dtype], in_first, y.data_ptr(),
                self.ends.data_ptr(), num_experts, num_in, num_out, torch.get_num_threads(), then,
                own,
            )
        )  # fmt: skip
        if add is not None and not then:
            add.add(x, tokens, y)
        return y

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum in the order of each token's experts."""
        (num_tokens, k), y = weights.shape, y.contiguous()
        weights = weights.to(torch.float32).contiguous()
        out = torch.empty(num_tokens, y.shape[1])
        _library().combine(
            _COMBINE_FIELDS(
                y.data_ptr(), self._places.data_ptr(), weights.data_ptr(), out.data_ptr(),
                num_tokens, k, y.shape[1], torch.get_num_threads(),
            )
        )  # fmt: skip
        return out


def route(
    chosen: torch.Tensor, x: torch.Tensor, *weights: torch.Tensor, add: Additions | None = None
) -> Pairs:
    """Return the pairs of tokens x (T x in) with experts that have such matrices.

    ``add``: what their products will be added to, which is told of them here if that can be.
    """
    if can_be_native(x, *weights):
        return CpuPairs(chosen, len(weights[0]), add)
    return TorchPairs(chosen, len(weights[0]))


def can_be_native(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Return whether a kernel of our own computes with such numbers."""
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and all(each.is_cpu and each.dtype in TYPES and each.is_contiguous() for each in weights)
        and probe() is None
    )


def probe() -> str | None:
    """Return why there is no kernel of our own, or None."""
    return _loaded()[1]


class _Kernel(NamedTuple):
    """The compiled kernel."""

    pairs: Callable[[bytes], None]
    product: Callable[[bytes], None]
    combine: Callable[[bytes], None]


@functools.cache
def _loaded() -> tuple[_Kernel | None, str | None]:
    loaded, reason = load_library(_SOURCE)
    if loaded is None:
        return None, reason
    functions = [getattr(loaded, f"lorax_experts_{name}") for name in _Kernel._fields]
    for function in functions:
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    return _Kernel(*functions), None


def _library() -> _Kernel:
    library, reason = _loaded()
    assert library is not None, reason
    return library
