"""Three recordings of one pass at different sizes become numbers that scale with T and with S.

Whatever number of a pass is not n + t * T + s * S, nor an address in memory of the pass, is the
same at all sizes, or the pass is no program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.model.programs.recorder import (
    InputOf,
    NotAProgramError,
    Operation,
    OutputOf,
    Place,
)

_Numbers = NDArray[np.int64]


class Size(NamedTuple):
    """How large a pass is."""

    tokens: int
    logits: int


class Scaled(NamedTuple):
    """A number of passes: constant + tokens * T + logits * S."""

    constant: int
    tokens: int
    logits: int

    def at(self, size: Size) -> int:
        """Return the number at a size."""
        return self.constant + self.tokens * size.tokens + self.logits * size.logits


class Sizes:
    """Three sizes of a pass: the second has more tokens than the first, the third more logits."""

    def __init__(self, first: Size, more_tokens: Size, more_logits: Size) -> None:
        self._first = first
        self._tokens = more_tokens.tokens - first.tokens
        self._logits = more_logits.logits - first.logits
        assert (more_tokens.logits, more_logits.tokens) == first[::-1]

    def scaled(self, first: int, more_tokens: int, more_logits: int) -> Scaled:
        """Return what a number is at all sizes; NotAProgramError where it is not of that form."""
        tokens, rest = divmod(more_tokens - first, self._tokens)
        logits, more = divmod(more_logits - first, self._logits)
        if rest or more:
            raise NotAProgramError("a number of the pass follows neither its tokens nor its logits")
        constant = first - tokens * self._first.tokens - logits * self._first.logits
        return Scaled(constant, tokens, logits)

    def scaled_all(
        self, first: _Numbers, more_tokens: _Numbers, more_logits: _Numbers
    ) -> tuple[_Numbers, _Numbers, _Numbers]:
        """Return the same for many numbers: constants, and what grows with T and with S."""
        tokens, rest = np.divmod(more_tokens - first, self._tokens)
        logits, more = np.divmod(more_logits - first, self._logits)
        if rest.any() or more.any():
            raise NotAProgramError("a number of the pass follows neither its tokens nor its logits")
        constant = first - tokens * self._first.tokens - logits * self._first.logits
        return constant, tokens, logits


# What stands for an argument: called with what a pass has, or the argument itself.
Lookup = Callable[["Values"], Any]


class Values:
    """What the operations of a pass have given so far."""

    def __init__(
        self,
        size: Size,
        inputs: dict[str, torch.Tensor],
        view: Callable[[Place, Size], torch.Tensor],
        outputs: dict[int, Any] | None = None,
    ) -> None:
        self.size, self.inputs, self.view = size, inputs, view
        self.outputs: dict[int, Any] = {} if outputs is None else outputs

    def compute(self, operations: Sequence[tuple[int, ScaledOperation]]) -> None:
        """Compute operations of torch in their order."""
        for number, operation in operations:
            self.outputs[number] = operation.compute(self)

    def tensor(self, origin: OutputOf | InputOf) -> torch.Tensor:
        """Return a tensor of the pass."""
        if isinstance(origin, InputOf):
            return self.inputs[origin.name]
        output = self.outputs[origin.operation]
        found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[origin.result]
        return found


class ScaledOperation:
    """An operation of torch at any size."""

    def __init__(self, sizes: Sizes, first: Operation, *others: Operation) -> None:
        if any(each.function is not first.function for each in others):
            raise NotAProgramError(f"{first.function} is computed at some sizes only")
        self._function = first.function
        self._args = [lookup(sizes, *each) for each in _zip(first.args, *(o.args for o in others))]
        if any(each.kwargs.keys() != first.kwargs.keys() for each in others):
            raise NotAProgramError(f"{first.function} is told other things at some sizes")
        self._kwargs = {
            name: lookup(sizes, value, *(each.kwargs[name] for each in others))
            for name, value in first.kwargs.items()
        }

    def compute(self, values: Values) -> Any:
        """Compute it with what the pass has."""
        args = [each(values) for each in self._args]
        kwargs = {name: each(values) for name, each in self._kwargs.items()}
        return self._function(*args, **kwargs)


def lookup(sizes: Sizes, *found: Any) -> Lookup:
    """Return what gives a pass a value that the three recordings found."""
    first = found[0]
    if any(type(each) is not type(first) for each in found):
        raise NotAProgramError("an argument is of another type at some sizes")
    if isinstance(first, OutputOf | InputOf):
        _same(found)
        return lambda values: values.tensor(first)
    if isinstance(first, Place):
        place = scaled_place(sizes, *found)
        return lambda values: values.view(place, values.size)
    if isinstance(first, list | tuple):
        return _list_lookup(type(first), [lookup(sizes, *each) for each in _zip(*found)])
    if isinstance(first, torch.Tensor):
        if any(each is not first and not torch.equal(each, first) for each in found):
            raise NotAProgramError("a tensor that the model's code makes follows the pass")
        return lambda values: first
    if type(first) is int and len(set(found)) > 1:
        number = sizes.scaled(*found)
        return lambda values: number.at(values.size)
    _same(found)
    return lambda values: first


def scaled_place(sizes: Sizes, first: Place, *others: Place) -> Place:
    """Return a place whose numbers are ``Scaled``."""
    if any((each.dtype, len(each.shape)) != (first.dtype, len(first.shape)) for each in others):
        raise NotAProgramError("a tensor has another shape at some sizes")

    def numbers(*found: Sequence[int]) -> tuple[Any, ...]:
        return tuple(sizes.scaled(*each) for each in zip(*found, strict=True))

    every = (first, *others)
    return Place(
        first.storage,
        sizes.scaled(*(each.offset for each in every)),  # type: ignore[arg-type]
        first.dtype,
        numbers(*(each.shape for each in every)),
        numbers(*(each.strides for each in every)),
    )


def _list_lookup(kind: Any, parts: list[Lookup]) -> Lookup:
    return lambda values: kind(part(values) for part in parts)


def _zip(*found: Sequence[Any]) -> list[tuple[Any, ...]]:
    if len({len(each) for each in found}) > 1:
        raise NotAProgramError("an operation has other arguments at some sizes")
    return list(zip(*found, strict=True))


def _same(found: Sequence[Any]) -> None:
    if any(each != found[0] for each in found):
        raise NotAProgramError("an argument differs from size to size")
