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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from lorax_shard.native import load_library
from lorax_shard.numbers import TYPES

_SOURCE = Path(__file__).with_name("experts.cpp")
# The fields of PairsCall, NumbersCall, ProductCall and CombineCall.
_PAIRS_FIELDS = struct.Struct("=8q").pack
_NUMBERS_FIELDS = struct.Struct("=6q").pack
_PRODUCT_FIELDS = struct.Struct("=12q").pack
_COMBINE_FIELDS = struct.Struct("=8q").pack


class Pairs(ABC):
    """The pairs of one step at one block of experts."""

    def __init__(self, experts: torch.Tensor, tokens: torch.Tensor, ends: torch.Tensor) -> None:
        # Of each pair, and where those of each expert end.
        self.experts, self.tokens, self.ends = experts, tokens, ends

    @abstractmethod
    def numbers(self, slots: torch.Tensor, per_slot: int) -> torch.Tensor:
        """Return slot * per_slot + expert of each pair, by its token's slot (T int64); -1: none."""

    @abstractmethod
    def of_tokens(self, x: torch.Tensor, weight: torch.Tensor, *, in_first: bool) -> torch.Tensor:
        """Multiply the token of each pair (x: T x in) with its expert's matrix: pairs x out.

        ``weight`` is experts x in x out with ``in_first``, else experts x out x in.
        """

    @abstractmethod
    def of_pairs(self, x: torch.Tensor, weight: torch.Tensor, *, in_first: bool) -> torch.Tensor:
        """Multiply each pair's own row (x: pairs x in) with its expert's matrix: pairs x out."""

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

    def numbers(self, slots: torch.Tensor, per_slot: int) -> torch.Tensor:
        """Compute all pairs at once."""
        of_pairs = slots[self.tokens]
        return torch.where(of_pairs < 0, -1, of_pairs * per_slot + self.experts)

    def of_tokens(self, x: torch.Tensor, weight: torch.Tensor, *, in_first: bool) -> torch.Tensor:
        """Gather the tokens first."""
        return self.of_pairs(x[self.tokens], weight, in_first=in_first)

    def of_pairs(self, x: torch.Tensor, weight: torch.Tensor, *, in_first: bool) -> torch.Tensor:
        """Compute all experts in one call."""
        weight = weight.to(x.dtype)
        y: torch.Tensor = functional.grouped_mm(
            x, weight if in_first else weight.mT, offs=self.ends
        )
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

    def __init__(self, chosen: torch.Tensor, num_experts: int) -> None:
        """Sort tokens by the experts that they go to (T x k)."""
        (num_tokens, k), chosen = chosen.shape, chosen.to(torch.int64).contiguous()
        ends = torch.empty(num_experts, dtype=torch.int64)
        experts, tokens, self._places = torch.empty(3, num_tokens * k, dtype=torch.int64).unbind()
        super().__init__(experts, tokens, ends)
        _library().pairs(
            _PAIRS_FIELDS(
                chosen.data_ptr(), num_tokens, k, num_experts, ends.data_ptr(),
                tokens.data_ptr(), experts.data_ptr(), self._places.data_ptr(),
            )
        )  # fmt: skip

    def numbers(self, slots: torch.Tensor, per_slot: int) -> torch.Tensor:
        """Compute them pair by pair."""
        slots, numbers = slots.contiguous(), torch.empty_like(self.tokens)
        _library().numbers(
            _NUMBERS_FIELDS(
                slots.data_ptr(), self.tokens.data_ptr(), self.experts.data_ptr(),
                numbers.data_ptr(), len(numbers), per_slot,
            )
        )  # fmt: skip
        return numbers

    def of_tokens(self, x: torch.Tensor, weight: torch.Tensor, *, in_first: bool) -> torch.Tensor:
        """Read the tokens where they lie."""
        return self._product(x, self.tokens.data_ptr(), weight, in_first)

    def of_pairs(self, x: torch.Tensor, weight: torch.Tensor, *, in_first: bool) -> torch.Tensor:
        """Compute all experts in one call."""
        return self._product(x, 0, weight, in_first)

    def _product(
        self, x: torch.Tensor, tokens: int, weight: torch.Tensor, in_first: bool
    ) -> torch.Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        num_experts, one, other = weight.shape
        num_in, num_out = (one, other) if in_first else (other, one)
        y = torch.empty(len(self.experts), num_out)
        _library().product(
            _PRODUCT_FIELDS(
                x.data_ptr(), x.stride(0), tokens, weight.data_ptr(), TYPES[weight.dtype], in_first,
                y.data_ptr(), self.ends.data_ptr(), num_experts, num_in, num_out,
                torch.get_num_threads(),
            )
        )  # fmt: skip
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


def route(chosen: torch.Tensor, x: torch.Tensor, *weights: torch.Tensor) -> Pairs:
    """Return the pairs of tokens x (T x in) with experts that have such matrices."""
    kind = CpuPairs if can_be_native(x, *weights) else TorchPairs
    return kind(chosen, len(weights[0]))


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
    numbers: Callable[[bytes], None]
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
