"""A pass of any size as one list of kernels, between a few operations of torch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.model.programs.memory import Lifetime, lay_out
from lorax_shard.model.programs.operations import operations
from lorax_shard.model.programs.recorder import (
    InputOf,
    NotAProgramError,
    OutputOf,
    Place,
    Recording,
)
from lorax_shard.model.programs.scaled import ScaledOperation, Size, Sizes, Values, lookup

_Numbers = NDArray[np.int64]
# Memory that tensors of the pass lie in: what grows with T, what grows with S.
_TOKENS, _LOGITS = 1, 2
# Bytes before the first tensor, so that each begins at a line of the cache.
_ALIGNMENT = 64
# Of these bytes less are written sooner than a second thread has begun.
_MUCH = 1 << 18


class Arena:
    """Memory of what kernels write: of programs that run one after the other, the same."""

    def __init__(self) -> None:
        self._tensors = {kind: torch.empty(0, dtype=torch.uint8) for kind in (_TOKENS, _LOGITS)}

    def memory(self, kind: int, nbytes: int) -> torch.Tensor:
        """Return so many bytes, from a line of the cache on; until more are asked for."""
        if self._tensors[kind].nbytes < nbytes + _ALIGNMENT:
            self._tensors[kind] = torch.empty(0, dtype=torch.uint8)  # never both
            self._tensors[kind] = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8)
        start = -self._tensors[kind].data_ptr() % _ALIGNMENT
        return self._tensors[kind][start : start + nbytes]


class Program:
    """What three recordings of a pass have in common; computes passes of any size.

    What it returns is overwritten by the next pass.
    """

    def __init__(
        self, sizes: Sizes, recordings: tuple[Recording, Recording, Recording], arena: Arena
    ) -> None:
        """Raise NotAProgramError, with words, where the recordings are not one program."""
        self._calls = _Calls(sizes, recordings, arena)
        self._before = _operations(sizes, [each.before for each in recordings])
        self._after = _operations(sizes, [each.after for each in recordings])
        self._result = lookup(sizes, *(each.result for each in recordings))

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
        self._calls.run(size, values)
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
        storages = [np.concatenate([call.storages for call in each.calls]) for each in recordings]
        if not all((each == storages[0]).all() for each in storages):
            raise NotAProgramError("kernels are told of other memory at other sizes")
        # What each kernel took in all passes, where that is asked for.
        self.seconds: NDArray[np.float64] | None = None
        self._memory = PassMemory(sizes, recordings, storages[0], np.array(lens), arena)
        light = np.array([each.is_light for each in self._functions])
        self._bytes = np.where(light, self._memory.bytes_of_calls, _MUCH)
        self._constant, self._tokens, self._logits = _scaled_fields(sizes, recordings, storages[0])
        self._constant, self._tokens, self._logits, self._bases = self._memory.placed(
            storages[0], self._constant, self._tokens, self._logits
        )

    @property
    def names(self) -> list[str]:
        return [each.name for each in self._functions]

    def without(self, names: frozenset[str]) -> _Calls:
        """Return the calls of other kernels; fields stay where they are."""
        other = copy.copy(self)
        kept = np.array([each not in names for each in self.names])
        other._functions = [each for each in self._functions if each.name not in names]
        other._kernels, other._starts = self._kernels[kept], self._starts[kept]
        other._bytes = self._bytes[kept]
        return other

    def reserve(self, size: Size) -> PassMemory:
        """Return memory for a pass of this size."""
        self._memory.reserve(size)
        return self._memory

    def run(self, size: Size, values: Values) -> None:
        """Call the kernels."""
        bases = self._memory.bases(values)
        fields = bases[self._bases]
        fields += self._constant
        fields += self._tokens * size.tokens
        fields += self._logits * size.logits
        are_small = (self._bytes * max(size) < _MUCH).astype(np.int8)
        self._run(
            self._kernels.ctypes.data, self._starts.ctypes.data, are_small.ctypes.data, len(self._kernels),
            fields.ctypes.data, torch.get_num_threads(),
            None if self.seconds is None else self.seconds.ctypes.data,
        )  # fmt: skip


class PassMemory:
    """Knows where the tensors of a pass of any size lie: those that kernels write, and all others."""

    def __init__(
        self,
        sizes: Sizes,
        recordings: tuple[Recording, Recording, Recording],
        storages: _Numbers,
        lens: _Numbers,
        arena: Arena,
    ) -> None:
        self._arena = arena
        self._own: dict[int, int] = {}
        # What comes from torch's operations and from outside, in the order of its bases.
        self._given: dict[int, OutputOf | InputOf] = {}
        lifetimes: dict[int, dict[int, Lifetime]] = {_TOKENS: {}, _LOGITS: {}}
        uses = np.repeat(np.arange(len(lens)), lens)
        kept = {each.storage for each in _places(recordings[0])}
        for number in [*np.unique(storages[storages >= 0]).tolist(), *kept]:
            every = [each.memories[number] for each in recordings]
            if len({each.origin for each in every}) > 1:
                raise NotAProgramError("tensors come from elsewhere at other sizes")
            if (origin := every[0].origin) is not None:
                self._given[number] = origin
                continue
            nbytes = sizes.scaled(*(each.nbytes for each in every))
            if nbytes.constant or bool(nbytes.tokens) == bool(nbytes.logits):
                raise NotAProgramError("a tensor grows neither with the tokens nor with the logits")
            kind = _TOKENS if nbytes.tokens else _LOGITS
            at = uses[storages == number]
            last = len(lens) if number in kept else int(at.max())
            life = Lifetime(int(at.min()) if len(at) else 0, last, nbytes.tokens or nbytes.logits)
            self._own[number], lifetimes[kind][number] = kind, life
        # Of each call, for each token or logit.
        self.bytes_of_calls = np.zeros(len(lens), dtype=np.int64)
        for lives in lifetimes.values():
            for number, life in lives.items():
                self.bytes_of_calls[np.unique(uses[storages == number])] += life.nbytes
        self._layouts = {kind: lay_out(each) for kind, each in lifetimes.items()}
        self._memory: dict[int, torch.Tensor] = {}

    def reserve(self, size: Size) -> None:
        """Have memory for a pass of this size."""
        self._memory = {
            kind: self._arena.memory(kind, self._layouts[kind].nbytes * number)
            for kind, number in ((_TOKENS, size.tokens), (_LOGITS, size.logits))
        }

    def placed(
        self, storages: _Numbers, constant: _Numbers, tokens: _Numbers, logits: _Numbers
    ) -> tuple[_Numbers, _Numbers, _Numbers, _Numbers]:
        """Return fields whose addresses count from their bases, and the number of each one's base."""
        bases = np.zeros(len(storages), dtype=np.int64)
        growing = {_TOKENS: tokens.copy(), _LOGITS: logits.copy()}
        for number, kind in self._own.items():
            fields = storages == number
            bases[fields] = kind
            growing[kind][fields] += self._layouts[kind].offsets[number]
        for index, number in enumerate(self._given):
            bases[storages == number] = _LOGITS + 1 + index
        return constant, growing[_TOKENS], growing[_LOGITS], bases

    def bases(self, values: Values) -> _Numbers:
        """Return where the memories begin in this pass."""
        own = [self._memory[kind].data_ptr() for kind in (_TOKENS, _LOGITS)]
        given = [
            values.tensor(origin).untyped_storage().data_ptr() for origin in self._given.values()
        ]
        return np.array([0, *own, *given], dtype=np.int64)

    def view(self, place: Place, size: Size) -> torch.Tensor:
        """Return a tensor that kernels wrote."""
        kind = self._own[place.storage]
        number = size.tokens if kind == _TOKENS else size.logits
        start = self._layouts[kind].offsets[place.storage] * number
        memory = self._memory[kind][start:].view(place.dtype)
        at: Any = place
        shape, strides = ([each.at(size) for each in part] for part in (at.shape, at.strides))
        return memory.as_strided(shape, strides, memory.storage_offset() + at.offset.at(size))


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


def _places(recording: Recording) -> list[Place]:
    """Return what torch's operations, and whoever asked for the pass, read of what kernels wrote."""
    found: list[Place] = []

    def look(value: Any) -> None:
        if isinstance(value, Place):
            found.append(value)
        elif isinstance(value, list | tuple):
            for each in value:
                look(each)

    for operation in recording.after.values():
        look((operation.args, tuple(operation.kwargs.values())))
    look(recording.result)
    return found
