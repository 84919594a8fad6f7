"""Draws of rows that are drawn in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorax_shard.sampling.sampled import NO_TOKEN, Draws, SampledTokens, nothing_sampled


class DrawnPart(NamedTuple):
    """Some rows of a batch, and what is drawn for them."""

    # Their places in the batch, also as they are on the device.
    places: list[int]
    on_device: torch.Tensor
    draws: Draws


class PartedDraws:
    """Draws of one batch in parts; implements Draws."""

    def __init__(self, parts: Sequence[DrawnPart]) -> None:
        self._parts = parts
        self._num_rows = sum(len(part.places) for part in parts)
        self._drawn = {
            row: (part.draws, place) for part in parts for place, row in enumerate(part.places)
        }
        self.on_device = self._ids_on_device()

    def _ids_on_device(self) -> torch.Tensor | None:
        ids = torch.empty(0)
        for part in self._parts:
            own = part.draws.on_device
            if own is None:
                return None
            if not len(ids):
                ids = own.new_empty(self._num_rows)
            ids.index_copy_(0, part.on_device, own)
        return ids

    def fail(self, index: int, reason: str) -> None:
        """Let a row have no token."""
        draws, place = self._drawn[index]
        draws.fail(place, reason)
        if self.on_device is not None:
            self.on_device[index] = NO_TOKEN

    def read(self) -> SampledTokens:
        """Return the tokens, once they are there; any thread."""
        whole = nothing_sampled(self._num_rows)
        for part in self._parts:
            tokens = part.draws.read()
            for place, row in enumerate(part.places):
                whole.ids[row] = tokens.ids[place]
                whole.logprobs[row] = tokens.logprobs[place]
                whole.alternatives[row] = tokens.alternatives[place]
            whole.errors |= {part.places[place]: why for place, why in tokens.errors.items()}
        return whole
