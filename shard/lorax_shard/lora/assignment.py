"""Which rows of a step compute with which adapter slot.

A slot is a small number under which one adapter is loaded; a row without one is a base
row. Rows here are the rows of one tensor: the tokens of a step, or its logit rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.transfer import to_device

IdArray = NDArray[np.int64]

# What stands for "no slot" in arrays of slots.
BASE = -1


def bits_of(first: int, count: int) -> int:
    """Return a mask of neighbouring slots."""
    return ((1 << count) - 1) << first


class Segment(NamedTuple):
    """Neighbouring rows of one slot: start <= row < stop."""

    slot: int
    start: int
    stop: int


class Assignment:
    """The slot of each row of one tensor; immutable but for what others keep in it."""

    is_fixed = False

    def __init__(
        self, slot_of_row: IdArray, device: torch.device, slots: tuple[int, ...] | None = None
    ) -> None:
        """``slots``: those that have rows, ascending, where they are known already."""
        self.slot_of_row = slot_of_row
        self._known_slots = slots
        self.num_rows = len(slot_of_row)
        self.device = device
        # The slots on the device, where somebody asked for them there.
        self.slots_there: torch.Tensor | None = None
        # What siblings share: one low-rank input at a time, held by its group.
        self.shared: tuple[object, torch.Tensor, Any] | None = None
        # Values a backend computes in the first module and reuses in the others.
        self.scratch: dict[str, Any] = {}
        self._rows: dict[int, slice | torch.Tensor] = {}

    @functools.cached_property
    def segments(self) -> list[Segment]:
        """Runs of rows with a slot, in the order of the rows."""
        return _segments(self.slot_of_row)

    @functools.cached_property
    def slots(self) -> tuple[int, ...]:
        """The slots that have rows here, ascending."""
        if self._known_slots is not None:
            return self._known_slots
        return tuple(sorted({segment.slot for segment in self.segments}))

    @functools.cached_property
    def mask(self) -> int:
        """Bit s is set if slot s has rows here."""
        return sum(1 << slot for slot in self.slots)

    def rows(self, slot: int) -> slice | torch.Tensor:
        """Return the rows of a slot: a slice if they are neighbours, else their numbers."""
        found = self._rows.get(slot)
        if found is None:
            segments = [segment for segment in self.segments if segment.slot == slot]
            if len(segments) == 1:
                found = slice(segments[0].start, segments[0].stop)
            else:
                numbers = np.flatnonzero(self.slot_of_row == slot)
                found = to_device(torch.from_numpy(numbers), self.device)
            self._rows[slot] = found
        return found


class FixedAssignment(Assignment):
    """Rows whose slots are read on the device, each time a graph is replayed: none is known here."""

    is_fixed = True

    def __init__(self, slots: torch.Tensor) -> None:
        super().__init__(np.full(len(slots), BASE, dtype=np.int64), slots.device)
        self.slots_there = slots


class LoraStep:
    """The adapters of one forward pass."""

    def __init__(self, tokens: Assignment, logit_rows: IdArray | torch.Tensor | None) -> None:
        self.tokens = tokens
        self._logit_rows = logit_rows

    @functools.cached_property
    def logits(self) -> Assignment:
        """The rows that the head computes; made when it is asked for, which few adapters do.

        What lies on a device is waited for.
        """
        rows = self._logit_rows
        if isinstance(rows, torch.Tensor):
            rows = rows.cpu().numpy()
        of_token = self.tokens.slot_of_row
        if rows is None or np.array_equal(rows, np.arange(len(of_token))):
            return self.tokens
        return Assignment(of_token[rows], self.tokens.device)

    def end(self) -> None:
        """Let go of what modules shared."""
        self.tokens.shared = None
        if "logits" in self.__dict__:
            self.logits.shared = None


def make_step(
    lens: Sequence[int],
    slots: Sequence[int | None],
    logit_rows: IdArray | torch.Tensor | None,
    device: torch.device,
) -> LoraStep | None:
    """Lay out a step of runs with ``lens[i]`` tokens and slot ``slots[i]`` each.

    ``logit_rows`` are the token numbers that the head computes; None: all of them. Returns
    None when no run has a slot.
    """
    of_run = [BASE if slot is None else slot for slot in slots]
    if set(of_run) <= {BASE}:
        return None
    of_token = np.repeat(np.array(of_run, dtype=np.int64), np.asarray(lens, dtype=np.int64))
    present = {slot for slot, length in zip(of_run, lens, strict=True) if length} - {BASE}
    return LoraStep(Assignment(of_token, device, tuple(sorted(present))), logit_rows)


def _segments(slot_of_row: IdArray) -> list[Segment]:
    if not len(slot_of_row):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(slot_of_row)) + 1])
    stops = [*starts[1:].tolist(), len(slot_of_row)]
    slots = slot_of_row[starts].tolist()
    segments = (Segment(*each) for each in zip(slots, starts.tolist(), stops, strict=True))
    return [segment for segment in segments if segment.slot != BASE]
