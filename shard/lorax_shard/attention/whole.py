"""Attention of encoders: each token of a row sees all others of its row, and nothing is kept.

Rows are computed as they are, one after the other or those of one length together, so no token
ever sees padding or another row.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from lorax_shard.attention.backend import AttentionBackend, AttentionSpec, StepMetadata


class _Group(NamedTuple):
    """Rows of one length: ``tokens`` are theirs, one row after the other."""

    length: int
    tokens: slice | torch.Tensor


class WholeAttention(AttentionBackend):
    """Computes rows that a step has whole; keeps neither K nor V, so it is no choice for decoders."""

    name: ClassVar[str] = "whole"

    def store(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, metadata: StepMetadata
    ) -> None:
        """Keep nothing: no later step has these rows."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> torch.Tensor:
        """Return the attention of each row over itself; a window reaches as far ahead as back."""
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for group in _groups(metadata):
            q, k, v = (
                each[group.tokens].view(-1, group.length, *each.shape[1:]).transpose(1, 2)
                for each in (query, key, value)
            )  # n x heads x length x dim
            mask = _window_mask(spec.window, group.length, metadata, query)
            attended = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=spec.scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            output[group.tokens] = attended.transpose(1, 2).flatten(0, 1)
        return output


def _groups(metadata: StepMetadata) -> list[_Group]:
    """Return the rows of a step by their length, each token in one group."""
    if "whole.groups" not in metadata.scratch:
        starts: dict[int, list[int]] = {}
        start = 0
        for length in metadata.query_lens:
            starts.setdefault(length, []).append(start)
            start += length
        device = metadata.slots.device
        metadata.scratch["whole.groups"] = [
            _Group(length, _tokens_of(at, length, device)) for length, at in starts.items()
        ]
    groups: list[_Group] = metadata.scratch["whole.groups"]
    return groups


def _tokens_of(starts: list[int], length: int, device: torch.device) -> slice | torch.Tensor:
    if starts[-1] - starts[0] == (len(starts) - 1) * length:
        return slice(starts[0], starts[-1] + length)
    first = torch.tensor(starts, device=device)
    return (first[:, None] + torch.arange(length, device=device)).flatten()


def _window_mask(
    window: int | None, length: int, metadata: StepMetadata, query: torch.Tensor
) -> torch.Tensor | None:  # length x length
    """Return what hides tokens as far away as ``window``; None: all are nearer."""
    if window is None or length <= window:
        return None
    key = f"whole.window.{window}.{length}"
    if key not in metadata.scratch:
        at = torch.arange(length, device=query.device)
        metadata.scratch[key] = (at[:, None] - at).abs() < window
    mask: torch.Tensor = metadata.scratch[key]
    return mask
