"""A pass of any size as one list of kernels, between a few operations of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.model.programs.arena import LOGIT_ROWS, Arena, PassMemory
from lorax_shard.model.programs.joined import CallFields, joined, product_memory
from lorax_shard.model.programs.operations import operations
from lorax_shard.model.programs.recorder import (
    InputOf,
    NotAProgramError,
    OutputOf,
    Place,
    Recording,
    is_changing,
    outputs_in,
)
from lorax_shard.model.programs.scaled import ScaledOperation, Size, Sizes, Values, lookup

_Numbers = NDArray[np.int64]
# Of these bytes less are written sooner than a second thread has begun.
_MUCH = 1 << 18


class Program:
    """What three recordings of a pass have in common; computes passes of any size.

    What it returns is overwritten by the next pass.
    """

    def __init__(
        self, sizes: Sizes, recordings: tuple[Recording, Recording, Recording], arena: Arena
    ) -> None:
        """Raise NotAProgramError, with words, where the recordings are not one program."""
        self._calls = _Calls(sizes, recordings, arena)
        needed = _needed(recordings[0], self._calls.given)
        self._before = [
            each
            for each in _operations(sizes, [each.before for each in recordings])
            if each[0] in needed
        ]
        self._after = _operations(sizes, [each.after for each in recordings])
        self._result = lookup(sizes, *(each.result for each in recordings))
        # Whether what torch computes last follows from the asked tokens.
        self._asks_little = _asks_little(recordings[0])

    @property
    def num_calls(self) -> int:
        """How many kernels a pass asks for."""
        return len(self._calls.names)

    def without(self, names: frozenset[str]) -> Program:
        """Return the program that leaves out kernels of these names, over the same memory."""
        other = copy.copy(self)
        other._calls = self._calls.without(names)
        return other

    def time_kernels(self) -> tuple[list[str], NDArray[np.float64]]:
        """Time kernels from now on; return their names and the seconds of each, which go on growing."""
        names = self._calls.names
        self._calls.seconds = np.zeros(len(names))
        return names, self._calls.seconds

    def run(self, size: Size, inputs: dict[str, torch.Tensor]) -> Any:
        """Compute a pass; return what the recorded ones did."""
        memory = self._calls.reserve(size)
        values = Values(size, inputs, memory.view)
        values.compute(self._before)
        self._calls.run(size, values, memory)
        values.compute(self._after)
        return self._result(values)

    @property
    def can_narrow(self) -> bool:
        """Whether the last kernels can be left to the asked tokens alone.

        They can where each of them goes by rows: behind the last layer's keys and values, which
        are in a cache, or of all tokens.
        """
        return self._asks_little and self._calls.can_narrow

    def run_narrowed(
        self,
        size: Size,
        inputs: dict[str, torch.Tensor],
        asked: torch.Tensor,
        narrow: Callable[[], None],
    ) -> Any:
        """Compute a pass whose last kernels see some tokens alone (indices into T).

        The last of them are those whose logits are asked for. ``narrow`` tells whatever knows the
        rows of the pass that each of these tokens is all that is left. In what is returned T
        tensors have their rows.
        """
        some = Size(len(asked), size.logits)
        memory = self._calls.reserve(size, some.tokens)
        values = Values(size, inputs, memory.view)
        values.compute(self._before)
        of_all = self._calls.run(size, values, memory, stop=self._calls.first_by_row)
        memory = memory.narrowed(size, asked, self._calls.crossing)
        inputs = {**inputs, LOGIT_ROWS: torch.arange(some.tokens - some.logits, some.tokens)}
        values = Values(some, inputs, memory.view, values.outputs)
        if some.tokens:
            narrow()
            self._calls.run(some, values, memory, start=self._calls.first_by_row, of_all=of_all)
        values.compute(self._after)
        return self._result(values)


class _Calls:
    """The kernels of a pass and their fields, which are numbers and addresses."""

    def __init__(
        self, sizes: Sizes, recordings: tuple[Recording, Recording, Recording], arena: Arena
    ) -> None:
        known, reason = operations()
        if known is None:
            raise NotAProgramError(reason or "")
        self._run = known.run
        first = recordings[0]
        names = [[call.function.name for call in each.calls] for each in recordings]
        if names[1] != names[0] or names[2] != names[0]:
            raise NotAProgramError("other kernels are called at other sizes")
        self._functions = [call.function for call in first.calls]
        self._kernels = np.array([each.team_address for each in self._functions], dtype=np.int64)
        lens = [len(call.fields) for call in first.calls]
        self._starts = np.cumsum([0, *lens[:-1]], dtype=np.int64)
        self._lens = np.array(lens)
        storages = [np.concatenate([call.storages for call in each.calls]) for each in recordings]
        if not all((each == storages[0]).all() for each in storages):
            raise NotAProgramError("kernels are told of other memory at other sizes")
        # What each kernel took in all passes, where that is asked for.
        self.seconds: NDArray[np.float64] | None = None
        self._memory = PassMemory(sizes, recordings, storages[0], self._lens, arena)
        light = np.array([each.is_light for each in self._functions])
        self._bytes = np.where(light, self._memory.bytes_of_calls, _MUCH)
        scaled = _scaled_fields(sizes, recordings, storages[0])
        self._fields = CallFields(*self._memory.placed(storages[0], *scaled), storages[0])
        of_all = [np.isin(np.arange(len(c.fields)), [*c.function.of_all]) for c in first.calls]
        self._of_all = np.flatnonzero(np.concatenate(of_all))
        self._join()
        self._find_narrow()

    def _join(self) -> None:
        """Compute kernels as one with those behind them, where that gives the same."""
        for index in reversed(range(len(self._functions) - 1)):
            first, second = self._functions[index : index + 2]
            fields, next_fields = self._fields_of(index), self._fields_of(index + 1)
            found = joined(first, fields, second, next_fields)
            if found is None or not self._is_between(product_memory(fields), index):
                continue
            self._functions[index], more = found
            self._starts[index], self._lens[index] = len(self._fields.constant), len(more.constant)
            self._kernels[index] = self._functions[index].team_address
            self._fields = self._fields.followed_by(more)
            self._leave_out(index + 1)

    def _fields_of(self, index: int) -> CallFields:
        return self._fields.at(slice(self._starts[index], self._starts[index] + self._lens[index]))

    def _is_between(self, storage: int, index: int) -> bool:
        """Return whether nobody but a kernel and the next one looks at some memory."""
        others = (each for each in range(len(self._functions)) if each not in (index, index + 1))
        return not self._memory.is_kept(storage) and not any(
            (self._fields_of(each).storages == storage).any() for each in others
        )

    def _leave_out(self, index: int) -> None:
        del self._functions[index]
        self._kernels, self._starts = (
            np.delete(self._kernels, index),
            np.delete(self._starts, index),
        )
        self._bytes, self._lens = np.delete(self._bytes, index), np.delete(self._lens, index)

    def _find_narrow(self) -> None:
        # Behind them, or from them on, each kernel goes by rows.
        others = (i + 1 for i, each in enumerate(self._functions) if not each.is_by_row)
        readers = (i for i, each in enumerate(self._functions) if each.of_all)
        self.first_by_row = first = max([0, *others, *readers])
        uses = [
            np.arange(start, start + num)
            for start, num in zip(self._starts, self._lens, strict=True)
        ]
        before = np.concatenate([np.zeros(0, dtype=np.int64), *uses[:first]])
        rest = np.concatenate([np.zeros(0, dtype=np.int64), *uses[first:]])
        bases, storages = self._fields.bases, self._fields.storages
        self.can_narrow = 0 < first < len(uses) and self._memory.asks_little(bases[rest])
        own = np.setdiff1d(rest, self._of_all)
        self.crossing = self._memory.crossing(storages[before], storages[own])

    @property
    def given(self) -> list[OutputOf | InputOf]:
        return self._memory.given

    @property
    def names(self) -> list[str]:
        return [each.name for each in self._functions]

    def without(self, names: frozenset[str]) -> _Calls:
        """Return the calls of other kernels; fields stay where they are."""
        other = copy.copy(self)
        kept = np.array([each not in names for each in self.names])
        other._functions = [each for each in self._functions if each.name not in names]
        other._kernels, other._starts = self._kernels[kept], self._starts[kept]
        other._bytes, other._lens = self._bytes[kept], self._lens[kept]
        other._join()
        other._find_narrow()
        return other

    def reserve(self, size: Size, more_tokens: int = 0) -> PassMemory:
        """Return memory for a pass of this size, see ``PassMemory``."""
        self._memory.reserve(size, more_tokens)
        return self._memory

    def run(
        self,
        size: Size,
        values: Values,
        memory: PassMemory,
        start: int = 0,
        stop: int | None = None,
        of_all: _Numbers | None = None,
    ) -> _Numbers:
        """Call the kernels, from one of them to before another one; return their fields.

        ``of_all``: those of all tokens, where these kernels have some of them alone.
        """
        bases = memory.bases(values)
        fields = bases[self._fields.bases]
        fields += self._fields.constant
        fields += self._fields.tokens * size.tokens
        fields += self._fields.logits * size.logits
        if of_all is not None:
            fields[self._of_all] = of_all[self._of_all]
        are_small = (self._bytes[start:stop] * max(size) < _MUCH).astype(np.int8)
        kernels, starts = self._kernels[start:stop], self._starts[start:stop]
        self._run(
            kernels.ctypes.data, starts.ctypes.data, are_small.ctypes.data, len(kernels),
            fields.ctypes.data, torch.get_num_threads(),
            None if self.seconds is None else self.seconds[start:stop].ctypes.data,
        )  # fmt: skip
        return fields


def _scaled_fields(
    sizes: Sizes, recordings: tuple[Recording, Recording, Recording], storages: _Numbers
) -> tuple[_Numbers, _Numbers, _Numbers]:
    """Return the fields of all calls, addresses counted from the beginning of their memory."""
    fields = []
    for recording in recordings:
        own = np.concatenate([call.fields for call in recording.calls])
        begins = np.array([0, *(memory.address for memory in recording.memories)], dtype=np.int64)
        fields.append(own - begins[storages + 1])
    return sizes.scaled_all(*fields)


def _operations(sizes: Sizes, found: list[dict[int, Any]]) -> list[tuple[int, ScaledOperation]]:
    if any(each.keys() != found[0].keys() for each in found):
        raise NotAProgramError("torch is asked for more at some sizes")
    return [
        (number, ScaledOperation(sizes, *(each[number] for each in found))) for number in found[0]
    ]


def _needed(recording: Recording, given: Sequence[OutputOf | InputOf]) -> set[int]:
    """Return the numbers of operations whose outputs matter; of those before the kernels few may."""
    if any(is_changing(each) for each in recording.before.values()):
        return set(recording.before)
    after = [(each.args, tuple(each.kwargs.values())) for each in recording.after.values()]
    left, needed = list(outputs_in([given, after, recording.result])), set[int]()
    while left:
        number = left.pop()
        if number in needed or number not in recording.before:
            continue
        needed.add(number)
        operation = recording.before[number]
        left += outputs_in([operation.args, tuple(operation.kwargs.values())])
    return needed


def _asks_little(recording: Recording) -> bool:
    """Return whether what torch computes behind the kernels reads of the pass what they wrote alone."""

    def is_little(value: Any) -> bool:
        if isinstance(value, InputOf):
            return value.name == LOGIT_ROWS
        if isinstance(value, OutputOf):
            return value.operation in recording.after
        if isinstance(value, list | tuple) and not isinstance(value, Place):
            return all(map(is_little, value))
        return True

    found = ((each.args, tuple(each.kwargs.values())) for each in recording.after.values())
    return all(map(is_little, found)) and is_little(recording.result)
