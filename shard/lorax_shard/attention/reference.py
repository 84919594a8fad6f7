"""The ``torch`` backend: one row after the other in float32, on any device. The specification."""

from __future__ import annotations

import torch

from lorax_shard.attention.backend import AttentionBackend, AttentionSpec, StepMetadata
from lorax_shard.attention.kv_cache import num_blocks_for


class TorchAttention(AttentionBackend):
    """Says what every other backend must compute; fast enough for tests only."""

    name = "torch"

    @classmethod
    def refuses_cache(cls, kv_dtype: torch.dtype, device: torch.device) -> str | None:  # noqa: ARG003 - what it gathers it widens
        """Return None: it reads any."""
        return None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> torch.Tensor:
        """Return the attention of each row over what the cache holds of it."""
        cache, outputs, start = metadata.cache, [], 0
        for row, (num_queries, length) in enumerate(
            zip(metadata.query_lens, metadata.context_lens, strict=True)
        ):
            blocks = metadata.block_tables[row, : num_blocks_for(length, cache.block_size)]
            keys, values = (
                each.flatten(0, 1)[:length] for each in cache.gather(layer, blocks, query.dtype)
            )
            outputs.append(_attend_row(query[start : start + num_queries], keys, values, spec))
            start += num_queries
        return torch.cat(outputs).to(query.dtype)


def _attend_row(
    query: torch.Tensor,  # n x H x D, the last n positions
    keys: torch.Tensor,  # L x G x D
    values: torch.Tensor,  # L x G x E
    spec: AttentionSpec,
) -> torch.Tensor:  # n x H x E
    num_queries, num_heads, _ = query.shape
    group = num_heads // keys.shape[1]
    # H x L x D and H x L x E: query head h reads KV head h // group.
    k = keys.float().repeat_interleave(group, dim=1).transpose(0, 1)
    v = values.float().repeat_interleave(group, dim=1).transpose(0, 1)
    scores = query.float().transpose(0, 1) @ k.transpose(1, 2) * spec.scaling
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    length = keys.shape[0]
    at = torch.arange(length, device=query.device)
    query_at = at[length - num_queries :, None]
    hidden = at > query_at
    if spec.window is not None:
        hidden |= at <= query_at - spec.window
    if spec.chunk is not None:
        hidden |= at // spec.chunk != query_at // spec.chunk
    scores = scores.masked_fill(hidden, float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.float()[:, None, None].expand(-1, num_queries, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights @ v).transpose(0, 1)
