"""What the kernels are told of a step: made in the first layer that asks, for all that are alike.

It is kept in the metadata's scratch, and comes to the device without waiting for what that still
computes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.attention.backend import AttentionSpec, StepMetadata
from lorax_shard.attention.triton import splits
from lorax_shard.transfer import to_device


class StepTensors(NamedTuple):
    """A step on the device: R int32 each, and the R x max_blocks block tables as int32."""

    first_tokens: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    tables: torch.Tensor


class DecodeSplits(NamedTuple):
    """Splits of decode rows on the device as int32, and where they leave their parts."""

    splits: torch.Tensor  # S x 3
    rows: torch.Tensor  # R x 2
    num: int
    partial: torch.Tensor  # S x H x E float32; nothing where no row is split
    stats: torch.Tensor  # 2 x S x H float32

    @property
    def is_split(self) -> bool:
        """Whether some row has several."""
        return self.num > len(self.rows)


def step_tensors(metadata: StepMetadata) -> StepTensors:
    """Return a step's lengths and tables on the device; made once and kept in its scratch.

    A step whose lengths are to be read from tensors of the caller's (a captured graph) gets
    them by ``metadata.scratch["triton.step"]``.
    """
    found: StepTensors | None = metadata.scratch.get("triton.step")
    if found is None:
        lens = np.array(metadata.query_lens)
        lines = np.stack([np.cumsum(lens) - lens, lens, np.array(metadata.context_lens)])
        packed = _to_device(lines, metadata)
        tables = metadata.block_tables.to(torch.int32).contiguous()
        found = StepTensors(packed[0], packed[1], packed[2], tables)
        metadata.scratch["triton.step"] = found
    return found


def query_tiles(block_q: int, metadata: StepMetadata) -> torch.Tensor:
    """Return of each tile of prompts its row, and its first query within the row."""
    key = f"triton.tiles.{block_q}"
    if key not in metadata.scratch:
        tiles = [
            (row, first)
            for row in range(metadata.num_decode_rows, len(metadata.query_lens))
            for first in range(0, metadata.query_lens[row], block_q)
        ]
        metadata.scratch[key] = _to_device(np.array(tiles), metadata)
    found: torch.Tensor = metadata.scratch[key]
    return found


def decode_splits(
    metadata: StepMetadata,
    spec: AttentionSpec,
    output: torch.Tensor,
    programs: int,
    *,
    num_processors: int,
    fixed: int | None = None,
) -> DecodeSplits:
    """Return how decode rows are split, ``programs`` to a split; with ``fixed`` into so many each.

    Layers run one after the other, and also share where splits leave their parts.
    """
    num_rows, (num_heads, value_dim) = metadata.num_decode_rows, output.shape[1:]
    reach = "" if fixed else f"{spec.window}.{spec.chunk}"
    key = f"triton.splits.{programs}.{num_heads}.{value_dim}.{reach}"
    if key not in metadata.scratch:
        if fixed:
            made = splits.fixed(num_rows, fixed)
        else:
            lens = metadata.context_lens[:num_rows]
            made = splits.by_length(lens, spec, programs, num_processors)
        numbers = _to_device(np.concatenate([made.splits, made.rows], axis=None), metadata)
        of_splits, of_rows = numbers[: made.splits.size], numbers[made.splits.size :]
        width = value_dim if made.num > num_rows else 0
        metadata.scratch[key] = DecodeSplits(
            of_splits.view(-1, 3), of_rows.view(-1, 2), made.num,
            output.new_empty((made.num, num_heads, width), dtype=torch.float32),
            output.new_empty((2, made.num, num_heads), dtype=torch.float32),
        )  # fmt: skip
    found: DecodeSplits = metadata.scratch[key]
    return found


def _to_device(numbers: NDArray[np.int64], metadata: StepMetadata) -> torch.Tensor:
    host = torch.from_numpy(numbers.astype(np.int32))
    return to_device(host, metadata.block_tables.device)
