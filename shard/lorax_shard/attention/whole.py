"""Attention of encoders: each token of a row sees all others of its row, and nothing is kept.

Rows of about one length are computed together, in as many calls as that takes: what fills the
shorter ones up is masked and seen by nobody.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from lorax_shard.attention.backend import (
    AttentionBackend,
    AttentionSpec,
    RelativeBias,
    StepMetadata,
)

# Scores that may be computed for nobody, as a part of those of a call's rows, and besides: as many as
# a call of its own costs.
_FILLED_PART, _CALL_SCORES = 0.5, 8192


class _Group(NamedTuple):
    """Rows that are computed in one call: n of them, filled up to the longest (L)."""

    num_rows: int
    length: int
    # Of each place (n * L) the token; of a filled one any.
    tokens: slice | torch.Tensor
    # Places that are not filled, and their tokens; None: none is.
    own: tuple[torch.Tensor, torch.Tensor] | None
    # Keys that are there: n x 1 x 1 x L; None: all.
    is_there: torch.Tensor | None


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
        for number, group in enumerate(_groups(metadata)):
            q, k, v = (_taken(each, group) for each in (query, key, value))
            mask = _mask(number, group, spec.window, metadata)
            if spec.bias is not None:
                mask = _biased(number, group, mask, spec.bias, metadata)
            attended = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=spec.scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            _put(attended.transpose(1, 2).flatten(0, 1), output, group)
        return output


def _taken(values: torch.Tensor, group: _Group) -> torch.Tensor:
    """Return what a group's places have of values of tokens: n x heads x L x dim of T x heads x dim."""
    if isinstance(group.tokens, slice):
        found = values[group.tokens]
    else:
        # As lines: to copy them takes less than to look for each number.
        found = values.flatten(1).index_select(0, group.tokens)
    return found.view(group.num_rows, group.length, *values.shape[1:]).transpose(1, 2)


def _put(attended: torch.Tensor, output: torch.Tensor, group: _Group) -> None:
    """Put what a group's places were given (n * L x heads x dim) where their tokens are."""
    if isinstance(group.tokens, slice):
        output[group.tokens] = attended
        return
    lines, tokens = attended.flatten(1), group.tokens
    if group.own is not None:
        places, tokens = group.own
        lines = lines.index_select(0, places)
    output.flatten(1).index_copy_(0, tokens, lines)


def _groups(metadata: StepMetadata) -> list[_Group]:
    """Return the rows of a step by about their length, each token in one group."""
    if "whole.groups" not in metadata.scratch:
        starts, start = [], 0
        for length in metadata.query_lens:
            starts.append(start)
            start += length
        device = metadata.slots.device
        metadata.scratch["whole.groups"] = [
            _group(
                [starts[row] for row in rows], [metadata.query_lens[row] for row in rows], device
            )
            for rows in split_rows(metadata.query_lens)
        ]
    groups: list[_Group] = metadata.scratch["whole.groups"]
    return groups


def split_rows(lens: list[int]) -> list[list[int]]:
    """Return the rows that are computed together, each once: the longest first."""
    groups: list[list[int]] = []
    own = filled = 0
    for row in sorted(range(len(lens)), key=lambda row: -lens[row]):
        longest = lens[groups[-1][0]] if groups else 0
        filled += longest**2 - lens[row] ** 2
        own += lens[row] ** 2
        if not groups or filled > _FILLED_PART * own + _CALL_SCORES:
            groups.append([])
            own, filled = lens[row] ** 2, 0
        groups[-1].append(row)
    return groups


def _group(starts: list[int], lens: list[int], device: torch.device) -> _Group:
    num, longest = len(starts), lens[0]
    if num == 1:
        return _Group(1, longest, slice(starts[0], starts[0] + longest), None, None)
    at = torch.arange(longest)
    is_there = at < torch.tensor(lens)[:, None]  # n x L
    tokens = torch.where(is_there, torch.tensor(starts)[:, None] + at, starts[0]).flatten()
    if lens[-1] == longest:
        return _Group(num, longest, tokens.to(device), None, None)
    places = is_there.flatten().nonzero()[:, 0]
    own = (places.to(device), tokens[places].to(device))
    return _Group(num, longest, tokens.to(device), own, is_there[:, None, None].to(device))


def _mask(
    number: int, group: _Group, window: int | None, metadata: StepMetadata
) -> torch.Tensor | None:  # n x 1 x (1 or L) x L
    """Return what a group's tokens may see: keys that are there, nearer than ``window``; None: all."""
    if window is None or group.length <= window:
        return group.is_there
    key = f"whole.window.{window}.{number}"
    if key not in metadata.scratch:
        at = torch.arange(group.length, device=metadata.slots.device)
        near = (at[:, None] - at).abs() < window
        # A filled place sees itself: of nothing there would be no mean, and nobody asks for it.
        near = (
            near
            if group.is_there is None
            else (near & group.is_there)
            | torch.eye(group.length, dtype=torch.bool, device=at.device)
        )
        metadata.scratch[key] = near
    mask: torch.Tensor = metadata.scratch[key]
    return mask


def _biased(
    number: int,
    group: _Group,
    mask: torch.Tensor | None,
    bias: RelativeBias,
    metadata: StepMetadata,
) -> torch.Tensor:  # (n or 1) x H x L x L
    """Return what is added to a group's scores: the bias, and -inf where the mask lets nothing be seen.

    Layers that have the same bias share it.
    """
    key = f"whole.bias.{number}"
    made_of, added = metadata.scratch.get(key, (None, None))
    if made_of is not bias:
        added = _added(group, bias)
        if mask is not None:
            added = added.masked_fill(~mask, -torch.inf)
        metadata.scratch[key] = bias, added
    found: torch.Tensor = added
    return found


def _added(group: _Group, bias: RelativeBias) -> torch.Tensor:  # (n or 1) x H x L x L
    parts: list[torch.Tensor] = []
    if bias.by_distance is not None:
        parts.append(spread(bias.by_distance, group.length).unsqueeze(0))
    if bias.places is not None:
        # query x key
        places = spread(bias.places.long().unsqueeze(0), group.length)[0]
        if bias.of_query is not None:
            parts.append(_of_tokens(group, bias.of_query, places))
        if bias.of_key is not None:
            parts.append(_of_tokens(group, bias.of_key, places.T).transpose(2, 3))
    return sum(parts[1:], start=parts[0])


def _of_tokens(
    group: _Group, added: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:  # n x H x L x L
    """Return what each token of a group adds for each other one of its row: ``places`` is L x L."""
    if isinstance(group.tokens, slice):
        own = added[:, group.tokens]
    else:
        own = added.index_select(1, group.tokens)
    own = own.view(len(own), group.num_rows, group.length, -1)
    return own.gather(3, places.expand(*own.shape[:2], -1, -1)).transpose(0, 1)


def spread(by_distance: torch.Tensor, length: int) -> torch.Tensor:  # H x length x length
    """Return for each query of a row what there is of the distance of each key (H x 2N - 1)."""
    longest = (by_distance.shape[1] + 1) // 2
    # One token later, the same distances begin one key later.
    return by_distance.unfold(1, length, 1)[:, longest - length : longest].flip(1)
