"""DeBERTa's attention: what a distance adds to a score depends on the two tokens that it is between.

    score(i, j) = scaling * (q_i . k_j + q_i . K[i - j] + k_j . Q[i - j])

K and Q are linears of a table with a row for each bucket of distances; often those linears are the
ones that make queries and keys, and adapters change them. So in a step with adapters a layer makes K
and Q for each of them, of the rows that the step's longest text reaches, and each token's products with
them. For the base alone they are made once, of all rows, for backends that compute products themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import pad

from lorax_shard.attention.backend import RelativeBias
from lorax_shard.fused.forwards import Exchange, Forward
from lorax_shard.model.attention_hook import STEP_KEYWORD, paged_attention
from lorax_shard.model.called_step import CalledStep

_REACHED = "disentangled.reached"
# Rows of tables have as many numbers as any processor's vectors, or a multiple.
_WHOLE = 16


class _Reached(NamedTuple):
    """The rows of the table that a step reaches, and which of them each distance has."""

    rows: slice
    places: torch.Tensor  # 2N - 1, as ``RelativeBias`` has them


class _Tables(NamedTuple):
    """K and Q of a layer, as ``RelativeBias`` has them."""

    keys: torch.Tensor | None
    queries: torch.Tensor | None


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
    encoder, embeddings = backbone.encoder, backbone.embeddings
    longest = int(backbone.config.max_position_embeddings)
    exchange.put(embeddings, Forward(_embeddings(type(embeddings), current), "unmasked"))
    exchange.put(encoder, _encoder(type(encoder), current, longest))
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


def _embeddings(own: Any, current: CalledStep) -> Callable[..., torch.Tensor]:
    """Return embeddings that a step's mask changes nothing of: it has no padding."""

    def forward(embeddings: Any, *args: Any, **named: Any) -> torch.Tensor:
        if current.step is not None:
            named["mask"] = None
        return own.forward(embeddings, *args, **named)  # type: ignore[no-any-return]

    return forward


def _has_tables(current: CalledStep) -> bool:
    """Return whether a step's K and Q are those that are made once."""
    metadata = current.metadata
    return metadata is not None and metadata.backend.takes_tables and current.is_of_base


class _DistanceRows:
    """What layers need of an encoder's table; for steps whose K and Q are made once it is, too."""

    def __init__(self, own: Any, current: CalledStep, longest: int) -> None:
        """``own`` is the encoder's class, ``longest`` the tokens of the longest text."""
        self._own, self._current, self._longest = own, current, longest
        self._all_reached: _Reached | None = None
        self._all_rows: torch.Tensor | None = None

    def reached(self, encoder: Any) -> _Reached:
        """Return what the longest text of the step reaches, or any text."""
        if _has_tables(self._current):
            if self._all_reached is None:
                self._all_reached = _reach(self._own, encoder, self._longest)
            return self._all_reached
        assert self._current.metadata is not None
        scratch = self._current.metadata.scratch
        if _REACHED not in scratch:
            longest = max(self._current.metadata.query_lens)
            scratch[_REACHED] = _reach(self._own, encoder, longest)
        found: _Reached = scratch[_REACHED]
        return found

    def rows(self, encoder: Any) -> torch.Tensor:
        """Return the rows that are reached, for each variant: 1 x rows x hidden."""
        if not _has_tables(self._current):
            return self._normed(encoder)
        if self._all_rows is None:
            self._all_rows = self._normed(encoder)
        return self._all_rows

    def _normed(self, encoder: Any) -> torch.Tensor:
        rows = encoder.rel_embeddings.weight[self.reached(encoder).rows]
        table: torch.Tensor = rows.repeat(len(self._current.variants), 1).unsqueeze(0)
        if "layer_norm" in getattr(encoder, "norm_rel_ebd", ()):
            with self._current.for_each_variant(len(rows)):
                table = encoder.LayerNorm(table)
        return table


def _encoder(own: Any, current: CalledStep, longest: int) -> Forward:
    """Return an encoder that prepares for its layers what they need, not a matrix of all distances."""
    prepared = _DistanceRows(own, current, longest)

    def get_attention_mask(encoder: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        if current.step is None:
            return own.get_attention_mask(encoder, attention_mask)  # type: ignore[no-any-return]
        return attention_mask

    def get_rel_pos(encoder: Any, *args: Any, **named: Any) -> torch.Tensor | None:
        if current.step is None:
            return own.get_rel_pos(encoder, *args, **named)  # type: ignore[no-any-return]
        if current.metadata is None or not encoder.relative_attention:
            return None
        return prepared.reached(encoder).places

    def get_rel_embedding(encoder: Any) -> torch.Tensor | None:
        if current.metadata is None or not encoder.relative_attention:
            return own.get_rel_embedding(encoder)  # type: ignore[no-any-return]
        return prepared.rows(encoder)

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
    # Of each layer, K and Q of the base.
    tables: WeakKeyDictionary[nn.Module, _Tables] = WeakKeyDictionary()

    def bias_of(
        attention: Any, made: _Projected, places: torch.Tensor, rows: torch.Tensor, scaling: float
    ) -> RelativeBias | None:
        if made.of_keys is None and made.of_queries is None:
            return None
        if not _has_tables(current):
            of_query, of_key = _of_tokens(made, rows, scaling, current)
            return RelativeBias(places=places, of_query=of_query, of_key=of_key)
        if attention not in tables:
            tables[attention] = _tables(made, rows)
        keys, queries = tables[attention]
        return RelativeBias(places=places, key_table=keys, query_table=queries)

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
            bias = bias_of(attention, made, relative_pos, rel_embeddings, scaling)
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


def _tables(made: _Projected, rows: torch.Tensor) -> _Tables:
    """Return K and Q of the base as ``RelativeBias`` has them."""
    num_heads, _, width = made.query.shape[1:]

    def table(module: nn.Module | None) -> torch.Tensor | None:  # H x D x B
        if module is None:
            return None
        by_heads = module(rows)[0].view(-1, num_heads, width).permute(1, 2, 0)
        return pad(by_heads, (0, -by_heads.shape[2] % _WHOLE)).contiguous()

    return _Tables(table(made.of_keys), table(made.of_queries))


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
