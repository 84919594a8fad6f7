"""Where the rows of one ragged step lie: what every attention layer is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lorax_shard.attention.backend import AttentionBackend
    from lorax_shard.attention.kv_cache import PagedCache


@dataclass(slots=True)
class StepMetadata:
    """One step of R rows and T tokens, all concatenated without padding.

    Rows with one query token come first (``num_decode_rows`` of them), so that a
    backend can take them together. Each row attends to its own sequence only:
    query i of a row sits at position ``context_len - query_len + i`` and sees the
    KV of positions up to its own. The step's new K and V are written to ``slots``
    before anything is read.
    """

    query_lens: list[int]  # R; tokens each row computes
    context_lens: list[int]  # R; KV length of each row after the step
    slots: torch.Tensor  # T int64; block * block_size + offset of each token
    block_tables: torch.Tensor  # R x max_blocks int64; padded with a valid block
    num_decode_rows: int
    cache: PagedCache
    backend: AttentionBackend
    # Values a backend computes in the first layer and reuses in the others.
    scratch: dict[str, Any] = field(default_factory=dict)
