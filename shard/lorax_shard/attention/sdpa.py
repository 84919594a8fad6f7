"""The ``sdpa`` backend: PyTorch's fused attention over whole gathered blocks.

Decode rows of similar length are taken together: their blocks are gathered, each
as one contiguous piece, and one masked call covers them. Prompts whose KV is all
new read it where the model left it; a chunk with earlier context gathers its own
blocks. What depends on the step alone (groups, block numbers, masks) is computed
in the first layer and kept in the metadata's scratch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from lorax_shard.attention.backend import AttentionBackend, AttentionSpec, StepMetadata
from lorax_shard.attention.kv_cache import num_blocks_for

# A further group of decode rows costs about as much as gathering this many blocks.
_GROUP_COST_BLOCKS = 48
# Cached tokens that one group of decode rows gathers at most, unless one row has more.
_GROUP_TOKENS = 32768
# Queries that share one mask; bounds the size of a mask.
_QUERY_TILE = 256


class _DecodeGroup(NamedTuple):
    rows: torch.Tensor | None  # n row numbers; None: all decode rows in order
    blocks: torch.Tensor  # n * m block numbers
    mask: torch.Tensor  # n x 1 x 1 x (m * block_size), 0 or -inf


class _Tile(NamedTuple):
    first_query: int  # within the step's tokens
    num_queries: int
    # Where K and V lie: tokens of this step, or blocks of the cache.
    fresh: slice | None
    blocks: torch.Tensor | None
    mask: torch.Tensor | None  # num_queries x L; None: plain causal


class SdpaAttention(AttentionBackend):
    """Works on any device; what it is made for is a CPU."""

    name = "sdpa"

    @classmethod
    def refuses_cache(cls, kv_dtype: torch.dtype, device: torch.device) -> str | None:  # noqa: ARG003 - what it gathers it widens
        """Return None: it reads any."""
        return None

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        metadata: StepMetadata,
    ) -> None:
        """Write finite K and V only: a masked slot is multiplied by zero, and 0 x NaN is NaN.

        The row that computed a NaN has it in its hidden states and fails by them;
        a later owner of its blocks must not.
        """
        metadata.write(layer, _finite(key), _finite(value))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> torch.Tensor:
        """Return the attention of decode rows group by group and of prompts tile by tile."""
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        if metadata.cache.dtype != key.dtype:
            # A token that is computed again, in chunks of another size, sees the same.
            key, value = metadata.cache.as_stored(key), metadata.cache.as_stored(value)
        num_decoded = metadata.num_decode_rows
        if num_decoded:
            self._decode(query, output, layer, spec, metadata)
        for tile in _tiles(num_decoded, spec, metadata, query.dtype):
            self._prompt(tile, query, key, value, output, layer, spec, metadata)
        return output

    def _decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> None:
        cache = metadata.cache
        for group in _decode_groups(spec, metadata, query.dtype):
            rows = slice(0, metadata.num_decode_rows) if group.rows is None else group.rows
            q = query[rows].unsqueeze(2)  # n x H x 1 x D
            n = q.shape[0]
            k, v = cache.gather(layer, group.blocks, query.dtype)
            k = k.view(n, -1, *k.shape[2:]).transpose(1, 2)  # n x G x L x D
            v = v.view(n, -1, *v.shape[2:]).transpose(1, 2)
            output[rows] = _attention(q, k, v, group.mask, spec).squeeze(2)

    def _prompt(
        self,
        tile: _Tile,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        layer: int,
        spec: AttentionSpec,
        metadata: StepMetadata,
    ) -> None:
        if tile.blocks is None:
            k, v = key[tile.fresh], value[tile.fresh]
        else:
            found = metadata.cache.gather(layer, tile.blocks, query.dtype)
            k, v = (each.flatten(0, 1) for each in found)
            length = tile.mask.shape[-1] if tile.mask is not None else k.shape[0]
            k, v = k[:length], v[:length]
        at = slice(tile.first_query, tile.first_query + tile.num_queries)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query[at], k, v))
        output[at] = _attention(q, k, v, tile.mask, spec).squeeze(0).transpose(0, 1)


def _finite(values: torch.Tensor) -> torch.Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _attention(
    query: torch.Tensor,  # B x H x n x D
    key: torch.Tensor,  # B x G x L x D
    value: torch.Tensor,  # B x G x L x E
    mask: torch.Tensor | None,  # broadcasts to B x 1 x n x L; None: causal with n = L
    spec: AttentionSpec,
) -> torch.Tensor:  # B x H x n x E
    if spec.softcap is None and spec.sinks is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=spec.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    assert mask is not None  # _tiles makes masks for layers that need scores written out
    return _explicit_attention(query, key, value, mask, spec)


def _explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Write the scores out, for what the fused call does not offer; K and V stay unexpanded."""
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads = key.shape[1]
    folded = query.reshape(batch, num_kv_heads, -1, query.shape[-1])
    scores = (folded @ key.transpose(-1, -2)).float().mul_(spec.scaling)
    if spec.softcap is not None:
        scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    scores = scores.view(batch, num_heads, num_queries, -1).add_(mask)
    if spec.sinks is not None:
        sinks = spec.sinks.float().view(1, -1, 1, 1).expand(batch, -1, num_queries, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    weights = weights.to(value.dtype).reshape(*folded.shape[:3], -1)
    return (weights @ value).view(batch, num_heads, num_queries, -1)


def _decode_groups(
    spec: AttentionSpec, metadata: StepMetadata, dtype: torch.dtype
) -> list[_DecodeGroup]:
    key = f"sdpa.decode.{spec.window}.{spec.chunk}"
    if key not in metadata.scratch:
        metadata.scratch[key] = _make_decode_groups(spec, metadata, dtype)
    groups: list[_DecodeGroup] = metadata.scratch[key]
    return groups


def _make_decode_groups(
    spec: AttentionSpec, metadata: StepMetadata, dtype: torch.dtype
) -> list[_DecodeGroup]:
    size, device = metadata.cache.block_size, metadata.block_tables.device
    lengths = metadata.context_lens[: metadata.num_decode_rows]
    seen_from = [spec.first_seen(length - 1) for length in lengths]
    # The first block that holds a visible token, and how many follow.
    firsts = [at // size for at in seen_from]
    counts = [num_blocks_for(n, size) - first for n, first in zip(lengths, firsts, strict=True)]
    split = _split_by_count(counts, max_blocks=_GROUP_TOKENS // size)
    groups = []
    for rows in split:
        most = max(counts[row] for row in rows)
        chosen = torch.tensor(rows, device=device)
        first = torch.tensor([firsts[row] for row in rows], device=device)
        start = torch.tensor([seen_from[row] for row in rows], device=device)
        length = torch.tensor([lengths[row] for row in rows], device=device)
        columns = first[:, None] + torch.arange(most, device=device)
        # Past a row's end any valid block will do: the mask hides it.
        columns = columns.clamp_max(metadata.block_tables.shape[1] - 1)
        blocks = metadata.block_tables[chosen].gather(1, columns).flatten()
        at = first[:, None] * size + torch.arange(most * size, device=device)
        seen = (at >= start[:, None]) & (at < length[:, None])
        mask = _additive(seen, dtype)[:, None, None, :]
        groups.append(_DecodeGroup(chosen if len(split) > 1 else None, blocks, mask))
    return groups


def _split_by_count(counts: list[int], max_blocks: int) -> list[list[int]]:
    """Split rows into groups so that padding costs no more than the groups it saves.

    And so that a group, padding included, has no more than ``max_blocks`` if it can be.
    """
    order = sorted(range(len(counts)), key=lambda row: -counts[row])
    groups: list[list[int]] = []
    padding = 0
    for row in order:
        if groups:
            padding += counts[groups[-1][0]] - counts[row]
        is_full = bool(groups) and counts[groups[-1][0]] * (len(groups[-1]) + 1) > max_blocks
        if not groups or is_full or padding > _GROUP_COST_BLOCKS:
            groups.append([])
            padding = 0
        groups[-1].append(row)
    return groups if len(groups) > 1 else [list(range(len(counts)))]


def _tiles(
    first_row: int, spec: AttentionSpec, metadata: StepMetadata, dtype: torch.dtype
) -> list[_Tile]:
    fused = spec.softcap is None and spec.sinks is None
    key = f"sdpa.tiles.{spec.window}.{spec.chunk}.{fused}"
    if key not in metadata.scratch:
        metadata.scratch[key] = _make_tiles(first_row, spec, fused, metadata, dtype)
    tiles: list[_Tile] = metadata.scratch[key]
    return tiles


def _make_tiles(
    first_row: int, spec: AttentionSpec, fused: bool, metadata: StepMetadata, dtype: torch.dtype
) -> list[_Tile]:
    tiles = []
    start = sum(metadata.query_lens[:first_row])
    for row in range(first_row, len(metadata.query_lens)):
        num_queries, length = metadata.query_lens[row], metadata.context_lens[row]
        all_new = num_queries == length
        if all_new and fused and spec.first_seen(length - 1) == 0:
            tokens = slice(start, start + num_queries)
            tiles.append(_Tile(start, num_queries, tokens, None, None))
        else:
            for skipped in range(0, num_queries, _QUERY_TILE):
                count = min(_QUERY_TILE, num_queries - skipped)
                tiles.append(_masked_tile(row, start, skipped, count, spec, metadata, dtype))
        start += num_queries
    return tiles


def _masked_tile(
    row: int,
    start: int,
    skipped: int,
    count: int,
    spec: AttentionSpec,
    metadata: StepMetadata,
    dtype: torch.dtype,
) -> _Tile:
    """Return the tile of a row's queries ``skipped`` to ``skipped + count``."""
    size, device = metadata.cache.block_size, metadata.block_tables.device
    num_queries, length = metadata.query_lens[row], metadata.context_lens[row]
    position = length - num_queries + skipped  # of the tile's first query
    first = spec.first_seen(position)
    end = position + count
    fresh, blocks = None, None
    if num_queries == length:
        fresh = slice(start + first, start + end)
    else:
        first -= first % size
        blocks = metadata.block_tables[row, first // size : num_blocks_for(end, size)]
    at = torch.arange(first, end, device=device)
    query_at = torch.arange(position, end, device=device)[:, None]
    seen = at <= query_at
    if spec.window is not None:
        seen &= at > query_at - spec.window
    if spec.chunk is not None:
        seen &= at >= query_at - query_at % spec.chunk
    return _Tile(start + skipped, count, fresh, blocks, _additive(seen, dtype))


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )
