"""Memory of passes: one arena, and where in it the tensors of a pass of any size lie."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.model.programs.memory import Lifetime, lay_out
from lorax_shard.model.programs.recorder import (
    InputOf,
    NotAProgramError,
    OutputOf,
    Place,
    Recording,
)
from lorax_shard.model.programs.scaled import Size, Sizes, Values

_Numbers = NDArray[np.int64]
# Memory that tensors of the pass lie in: what grows with T, what grows with S.
_TOKENS, _LOGITS = 1, 2
# Bytes before the first tensor, so that each begins at a line of the cache.
_ALIGNMENT = 64
# The input of a pass that says of which tokens the logits are asked for.
LOGIT_ROWS = "logit_rows"


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
        self._kept = kept = {each.storage for each in _places(recordings[0])}
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
        # Of a token.
        self._nbytes = {number: life.nbytes for number, life in lifetimes[_TOKENS].items()}
        self._memory: dict[int, torch.Tensor] = {}

    def reserve(self, size: Size, more_tokens: int = 0) -> None:
        """Have memory for a pass of this size, and behind it for some tokens more."""
        self._memory = {
            kind: self._arena.memory(kind, self._layouts[kind].nbytes * number)
            for kind, number in ((_TOKENS, size.tokens + more_tokens), (_LOGITS, size.logits))
        }

    @property
    def given(self) -> list[OutputOf | InputOf]:
        """What kernels read that none of them wrote."""
        return list(self._given.values())

    def asks_little(self, bases: _Numbers) -> bool:
        """Return whether fields with these bases read of what is given which logits are asked for alone."""
        given = self.given
        origins = (given[base - _LOGITS - 1] for base in np.unique(bases[bases > _LOGITS]))
        return all(each == InputOf(LOGIT_ROWS) for each in origins)

    def is_kept(self, storage: int) -> bool:
        """Return whether whoever comes after the kernels reads a memory."""
        return storage in self._kept

    def crossing(self, before: _Numbers, rest: _Numbers) -> list[int]:
        """Return the T tensors that earlier kernels wrote and later ones read, or whoever comes last."""
        read = self._kept.union(rest.tolist())
        return sorted(read.intersection(before.tolist(), self._nbytes))

    def narrowed(self, size: Size, rows: torch.Tensor, crossing: list[int]) -> PassMemory:
        """Return memory of some tokens alone, behind that of all, which has these tensors' rows of them."""
        other = copy.copy(self)
        first = self._layouts[_TOKENS].nbytes * size.tokens
        other._memory = {**self._memory, _TOKENS: self._memory[_TOKENS][first:]}
        for number in crossing:
            to = other._rows(number, len(rows))
            torch.index_select(self._rows(number, size.tokens), 0, rows, out=to)
        return other

    def _rows(self, number: int, num_tokens: int) -> torch.Tensor:
        start, nbytes = self._layouts[_TOKENS].offsets[number] * num_tokens, self._nbytes[number]
        return self._memory[_TOKENS][start : start + nbytes * num_tokens].view(num_tokens, nbytes)

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
