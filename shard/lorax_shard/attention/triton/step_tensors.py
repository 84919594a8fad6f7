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

# Where a step's scratch has its StepTensors.
STEP_KEY = "triton.step"


class StepTensors(NamedTuple):
    """A step on the device: R int32 each, and the R x max_blocks block tables as int32."""

    first_tokens: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    tables: torch.Tensor


class DeviceSplits(NamedTuple):
    """Splits of neighbouring rows on the device as int32, and where they leave their parts."""

    splits: torch.Tensor  # S x 4
    num: int
    # What combines them, if some tile has several: T x 2, and how many places there are.
    queries: torch.Tensor
    num_places: int
    partial: torch.Tensor  # places x H x E float32
    stats: torch.Tensor  # 2 x places x H float32
    is_split: bool


def step_tensors(metadata: StepMetadata) -> StepTensors:
    """Return a step's lengths and tables on the device; made once and kept in its scratch."""
    found: StepTensors | None = metadata.scratch.get(STEP_KEY)
    if found is None:
        lens = np.array(metadata.query_lens)
        lines = np.stack([np.cumsum(lens) - lens, lens, np.array(metadata.context_lens)])
        packed = _to_device(lines, metadata)
        tables = metadata.block_tables.to(torch.int32).contiguous()
        found = StepTensors(packed[0], packed[1], packed[2], tables)
        metadata.scratch[STEP_KEY] = found
    return found


def device_splits(
    metadata: StepMetadata,
    rows: slice,
    output: torch.Tensor,
    spec: AttentionSpec,
    *,
    block_q: int,
    programs: int,
    num_processors: int,
    fixed: int | None = None,
) -> DeviceSplits:
    """Return how tiles of ``block_q`` queries are split; with ``fixed`` into so many each.

    ``programs`` compute a split. Layers run one after the other, and also share where splits leave
    their parts.
    """
    num_heads, value_dim = output.shape[1:]
    reach = None if fixed else spec
    key = splits_key(rows.start, block_q, programs, (num_heads, value_dim), reach)
    if key not in metadata.scratch:
        query_lens = metadata.query_lens[rows]
        if fixed:
            made = splits.fixed(query_lens, block_q, fixed)
        else:
            made = splits.by_length(
                query_lens, metadata.context_lens[rows], block_q, spec,
                splits.DECODE if block_q == 1 else splits.PROMPT,
                programs=programs, num_processors=num_processors,
            )  # fmt: skip
        asked = (made.splits, made.queries) if made.is_split else (made.splits,)
        numbers = _to_device(np.concatenate(asked, axis=None), metadata)
        of_splits, of_queries = numbers[: made.splits.size], numbers[made.splits.size :]
        num_places = made.num * block_q * made.is_split
        metadata.scratch[key] = DeviceSplits(
            of_splits.view(-1, 4), made.num, of_queries.view(-1, 2), num_places,
            output.new_empty((num_places, num_heads, value_dim), dtype=torch.float32),
            output.new_empty((2, num_places, num_heads), dtype=torch.float32),
            made.is_split,
        )  # fmt: skip
    found: DeviceSplits = metadata.scratch[key]
    return found


def splits_key(
    first_row: int, block_q: int, programs: int, parts: tuple[int, int], reach: AttentionSpec | None
) -> str:
    """Return where a step's scratch has the splits of rows from ``first_row`` on.

    ``parts`` are the heads of a part, and their size; ``reach`` says what queries see, where
    splits follow from it.
    """
    seen = "" if reach is None else f"{reach.window}.{reach.chunk}"
    return f"triton.splits.{first_row}.{block_q}.{programs}.{parts[0]}.{parts[1]}.{seen}"


def _to_device(numbers: NDArray[np.int64], metadata: StepMetadata) -> torch.Tensor:
    host = torch.from_numpy(numbers.astype(np.int32))
    return to_device(host, metadata.block_tables.device)
