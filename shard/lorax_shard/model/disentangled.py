"""DeBERTa's attention: what a distance adds to a score depends on the two tokens that it is between.

    score(i, j) = scaling * (q_i . k_j + q_i . K[i - j] + k_j . Q[i - j])

K and Q are linears of a table with a row for each bucket of distances; often those linears are the
ones that make queries and keys, and adapters change them. So a layer makes K and Q for each adapter
of the step, of the rows that the step's longest text reaches, and each token's products with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lorax_shard.attention.backend import RelativeBias
from lorax_shard.fused.forwards import Exchange, Forward
from lorax_shard.model.attention_hook import STEP_KEYWORD, paged_attention
from lorax_shard.model.called_step import CalledStep

_REACHED = "disentangled.reached"


class _Reached(NamedTuple):
    """The rows of the table that a step reaches, and which of them each distance has."""

    rows: slice
    places: torch.Tensor  # 2N - 1, as ``RelativeBias`` has them


class _Projected(NamedTuple):
    """What a layer makes of tokens, and by what it makes K and Q; None: it adds none of them."""

    query: torch.Tensor  # 1 x H x T x D
    key: torch.Tensor
    value: torch.Tensor
    of_keys: nn.Module | None
    of_queries: nn.Module | None


def plug(backbone: Any, current: CalledStep, exchange: Exchange) -> None:
    """Let a DeBERTa, of any release, attend as we do within steps."""
    backbone.register_forward_pre_hook(_with_mask, with_kwargs=True)
    encoder = backbone.encoder
    exchange.put(encoder, _encoder(type(encoder), current))
    conv = getattr(encoder, "conv", None)
    if conv is not None:
        exchange.put(conv.conv, Forward(_by_rows(type(conv.conv), current), "rows"))
    for layer in encoder.layer:
        attention = layer.attention.self
        exchange.put(attention, Forward(_attention(type(attention), current), "attention"))


def _with_mask(
    _module: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a call the mask that the class makes itself: where it does, it warns of tokens like padding."""
    if named.get("attention_mask") is None:
        ids = args[0] if args else named["input_ids"]
        named = {**named, "attention_mask": torch.ones(ids.shape, device=ids.device)}
    return args, named


def _encoder(own: Any, current: CalledStep) -> Forward:
    """Return an encoder that prepares for its layers what they need, not a matrix of all distances."""

    def reached(encoder: Any) -> _Reached:
        assert current.metadata is not None
        scratch = current.metadata.scratch
        if _REACHED not in scratch:
            scratch[_REACHED] = _reach(own, encoder, max(current.metadata.query_lens))
        found: _Reached = scratch[_REACHED]
        return found

    def get_attention_mask(encoder: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        if current.step is None:
            return own.get_attention_mask(encoder, attention_mask)  # type: ignore[no-any-return]
        return attention_mask

    def get_rel_pos(encoder: Any, *args: Any, **named: Any) -> torch.Tensor | None:
        if current.step is None:
            return own.get_rel_pos(encoder, *args, **named)  # type: ignore[no-any-return]
        if current.metadata is None or not encoder.relative_attention:
            return None
        return reached(encoder).places

    def get_rel_embedding(encoder: Any) -> torch.Tensor | None:
        if current.metadata is None or not encoder.relative_attention:
            return own.get_rel_embedding(encoder)  # type: ignore[no-any-return]
        rows = encoder.rel_embeddings.weight[reached(encoder).rows]
        table: torch.Tensor = rows.repeat(len(current.variants), 1).unsqueeze(0)
        if "layer_norm" in getattr(encoder, "norm_rel_ebd", ()):
            with current.for_each_variant(len(rows)):
                table = encoder.LayerNorm(table)
        return table  # 1 x (rows for each variant) x hidden

    names: dict[str, Callable[..., Any]] = {
        "get_attention_mask": get_attention_mask,
        "get_rel_pos": get_rel_pos,
        "get_rel_embedding": get_rel_embedding,
    }
    return Forward(own.forward, "relative", names)


def _reach(own: Any, encoder: Any, longest: int) -> _Reached:
    weight = encoder.rel_embeddings.weight
    tokens = weight.new_empty(1, longest, 0)
    # Of a key at the front, by queries behind it; those before it are as far on the other side.
    behind = own.get_rel_pos(encoder, tokens[:, :1], tokens)[0, :, 0]
    buckets = torch.cat([behind.flip(0), -behind[1:]]) + len(weight) // 2
    buckets = buckets.clamp(0, len(weight) - 1)
    # They go down with the distance.
    last, first = int(buckets[0]), int(buckets[-1])
    return _Reached(slice(first, last + 1), (buckets - first).int())


def _by_rows(own: Any, current: CalledStep) -> Callable[..., torch.Tensor]:
    """Return a convolution over tokens that ends where a row does."""

    def forward(conv: Any, x: torch.Tensor) -> torch.Tensor:
        lens = [x.shape[2]] if current.metadata is None else current.metadata.query_lens
        return torch.cat([own.forward(conv, row) for row in torch.split(x, lens, dim=2)], dim=2)

    return forward


def _attention(own: Any, current: CalledStep) -> Callable[..., Any]:
    def forward(
        attention: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        output_attentions: bool = False,
        query_states: torch.Tensor | None = None,
        relative_pos: torch.Tensor | None = None,
        rel_embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if current.step is None:
            return own.forward(  # type: ignore[no-any-return]
                attention, hidden_states, attention_mask, output_attentions, query_states,
                relative_pos, rel_embeddings,
            )  # fmt: skip
        project = _project_in_one if hasattr(attention, "in_proj") else _project
        made = project(attention, hidden_states)
        # One term more for each kind that the config names.
        num_terms = 1 + sum(kind in attention.pos_att_type for kind in ("c2p", "p2c"))
        scaling = (made.query.shape[-1] * num_terms) ** -0.5
        bias = None
        if relative_pos is not None and rel_embeddings is not None:
            of_query, of_key = _of_tokens(made, rel_embeddings, scaling, current)
            if of_query is not None or of_key is not None:
                bias = RelativeBias(places=relative_pos, of_query=of_query, of_key=of_key)
        step: dict[str, Any] = {"is_causal": False, STEP_KEYWORD: current.step}
        attended, _ = paged_attention(
            attention, made.query, made.key, made.value, None, scaling, relative_bias=bias, **step
        )
        return attended.flatten(2), None

    return forward


def _project(attention: Any, x: torch.Tensor) -> _Projected:
    """As DeBERTa v2 and v3 do."""
    heads = (*x.shape[:-1], -1, attention.attention_head_size)
    query, key, value = (
        linear(x).view(heads).transpose(1, 2)
        for linear in (attention.query_proj, attention.key_proj, attention.value_proj)
    )
    if attention.share_att_key:
        of_keys, of_queries = attention.key_proj, attention.query_proj
    else:
        of_keys = getattr(attention, "pos_key_proj", None)
        of_queries = getattr(attention, "pos_query_proj", None)
    kinds = attention.pos_att_type
    return _Projected(
        query, key, value,
        of_keys if "c2p" in kinds else None, of_queries if "p2c" in kinds else None,
    )  # fmt: skip


def _project_in_one(attention: Any, x: torch.Tensor) -> _Projected:
    """As the first DeBERTa does: query, key and value of a head follow each other, two with a bias."""
    width = attention.attention_head_size
    stacked = attention.in_proj(x).view(*x.shape[:-1], -1, 3 * width).transpose(1, 2)
    query, key, value = stacked.split(width, dim=-1)
    query_bias, value_bias = (
        each.view(-1, 1, width) for each in (attention.q_bias, attention.v_bias)
    )
    return _Projected(
        query + query_bias, key, value + value_bias,
        getattr(attention, "pos_proj", None), getattr(attention, "pos_q_proj", None),
    )  # fmt: skip


def _of_tokens(
    made: _Projected, table: torch.Tensor, scaling: float, current: CalledStep
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return what tokens add to scores by distance, as queries and as keys; see ``RelativeBias``."""
    variants = current.variants
    with current.for_each_variant(table.shape[1] // len(variants)):
        keys = None if made.of_keys is None else made.of_keys(table)
        queries = None if made.of_queries is None else made.of_queries(table)
    pairs = ((made.query, keys), (made.key, queries))
    of_query, of_key = (
        None if by is None else _products(states[0], by[0], scaling, variants)
        for states, by in pairs
    )
    return of_query, of_key


def _products(
    states: torch.Tensor,  # H x T x D
    by: torch.Tensor,  # (B for each variant) x H * D
    scaling: float,
    variants: list[slice | torch.Tensor],
) -> torch.Tensor:  # H x T x B
    num_heads, num_tokens, width = states.shape
    # Variants x H x D x B
    by = (by.view(len(variants), -1, num_heads, width) * scaling).permute(0, 2, 3, 1)
    if len(variants) == 1:
        return states @ by[0]
    found = states.new_empty(num_heads, num_tokens, by.shape[3])
    for tokens, own in zip(variants, by, strict=True):
        found[:, tokens] = states[:, tokens] @ own
    return found
