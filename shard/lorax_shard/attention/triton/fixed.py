"""Decode steps in Triton whose launches follow from the number of rows alone.

How contexts are split depends on all of their lengths. It is laid out on the host for each step,
as for any other, but the grid has room for the most splits that a step of so many rows can have
(see ``splits``): what is left over reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.attention.backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    FixedDecodes,
)
from lorax_shard.attention.triton import splits
from lorax_shard.attention.triton.programs import decode_programs, num_processors
from lorax_shard.attention.triton.step_tensors import (
    STEP_KEY,
    DeviceSplits,
    StepTensors,
    splits_key,
)

# A split behind the last one of its row: nothing is left to it, and its output is not final.
_NO_SPLIT = (0, 0, 2, 2)


class _Kind(NamedTuple):
    """Layers whose decode rows are split alike."""

    # In a step's scratch.
    key: str
    programs: int
    spec: AttentionSpec
    # Where parts are left, and how many fit there; layers run one after the other.
    partial: torch.Tensor
    stats: torch.Tensor


class FixedTritonDecodes(FixedDecodes):
    """Owns where splits leave their parts."""

    def __init__(
        self,
        backend: AttentionBackend,
        num_splits: int | None,
        layers: Sequence[AttentionLayer],
        max_rows: int,
        device: torch.device,
    ) -> None:
        self.backend, self._num_splits = backend, num_splits
        self._max_rows, self._device = max_rows, device
        self._rooms: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        kinds = [self._kind(layer) for layer in dict.fromkeys(layers)]
        self._kinds = list({kind.key: kind for kind in kinds}.values())
        self.shapes = {}
        for number, kind in enumerate(self._kinds):
            self.shapes[f"splits.{number}"] = (self._most_splits(max_rows, kind.programs), 4)
            self.shapes[f"queries.{number}"] = (max_rows, 2)
        self._first_tokens = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._query_lens = torch.ones(max_rows, dtype=torch.int32, device=device)

    def fill(
        self, numbers: Mapping[str, NDArray[np.int32]], context_lens: NDArray[np.int64]
    ) -> None:
        """Write the splits of rows of such lengths."""
        count = len(context_lens)
        for number, kind in enumerate(self._kinds):
            made = self._split(context_lens, kind)
            of_splits = numbers[f"splits.{number}"]
            of_splits[: made.num] = made.splits
            of_splits[made.num : self._most_splits(count, kind.programs)] = _NO_SPLIT
            numbers[f"queries.{number}"][:count] = made.queries

    def scratch(
        self,
        num_rows: int,
        context_lens: torch.Tensor,
        tables: torch.Tensor,
        numbers: Mapping[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Return what a step of so many rows keeps in its metadata."""
        rows = slice(0, num_rows)
        parts: dict[str, Any] = {
            STEP_KEY: StepTensors(
                self._first_tokens[rows], self._query_lens[rows], context_lens[rows], tables[rows]
            )
        }
        for number, kind in enumerate(self._kinds):
            most = self._most_splits(num_rows, kind.programs)
            parts[kind.key] = DeviceSplits(
                numbers[f"splits.{number}"][:most], most, numbers[f"queries.{number}"][rows], most,
                kind.partial, kind.stats, True,
            )  # fmt: skip
        return parts

    def _kind(self, layer: AttentionLayer) -> _Kind:
        spec = AttentionSpec(0.0, window=layer.window, chunk=layer.chunk)
        programs = decode_programs(layer.num_heads, layer.kv.num_heads).programs
        parts = layer.num_heads, layer.kv.value_dim
        reach = None if self._num_splits else spec
        key = splits_key(0, 1, programs, parts, reach)
        if parts not in self._rooms:
            places = self._most_splits(self._max_rows, 1)
            self._rooms[parts] = (
                torch.empty(places, *parts, dtype=torch.float32, device=self._device),
                torch.empty(2, places, parts[0], dtype=torch.float32, device=self._device),
            )
        return _Kind(key, programs, spec, *self._rooms[parts])

    def _split(self, context_lens: NDArray[np.int64], kind: _Kind) -> splits.TileSplits:
        query_lens = np.ones_like(context_lens)
        if self._num_splits:
            return splits.fixed(query_lens, 1, self._num_splits)
        return splits.by_length(
            query_lens, context_lens, 1, kind.spec, splits.DECODE,
            programs=kind.programs, num_processors=num_processors(self._device),
        )  # fmt: skip

    def _most_splits(self, num_rows: int, programs: int) -> int:
        if self._num_splits:
            return num_rows * self._num_splits
        return splits.most(num_rows, splits.DECODE, programs, num_processors(self._device))
