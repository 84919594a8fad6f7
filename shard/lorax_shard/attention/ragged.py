"""Attention of encoders on a CPU: the kernel of ``attend.cpp``, over rows that a step has whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from lorax_shard.attention.backend import AttentionSpec, RelativeBias, StepMetadata
from lorax_shard.attention.cpp import (
    NO_BIAS,
    PACK_ATTEND,
    CppAttention,
    StepRows,
    TileAttention,
    attend_kernel,
    numbers_together,
)
from lorax_shard.attention.whole import WholeAttention

_ROWS, _BIAS = "ragged.rows", "ragged.bias"
# The kernel reads whole vectors: as many numbers may lie behind the last one that counts.
_MOST_LANES = 16
# The fields of AttendCall that are addresses of K and of V.
_OF_ALL = frozenset({3, 4})
_WITH_ROOM = WeakIdKeyDictionary()
# Longer than any row: K and V of one lie together.
_ONE_BLOCK = 1 << 32


class WholeRows(StepRows):
    """What the kernel is told of rows that a step has whole: their lengths are all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = self._longest = 0
        # Of a row, for whatever was told of these rows; None: any number.
        self._most: int | None = None

    def fit(self, most: int) -> None:
        """Refuse rows of more tokens from now on, and now; ValueError."""
        self._most = most if self._most is None else min(most, self._most)
        if self._longest > self._most:
            raise ValueError(f"a row of {self._longest} tokens is longer than {self._most}")

    def fill(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: torch.Tensor | None,
    ) -> None:
        """Tell of another step."""
        self.num_tokens, self._longest = sum(query_lens), max(query_lens, default=0)
        if self._most is not None:
            self.fit(self._most)
        super().fill(query_lens, query_lens, None)

    def scratch(self) -> dict[str, Any]:
        """Return itself, where the first layer would put its own."""
        return {_ROWS: self}


class RaggedAttention(WholeAttention):
    """The same kernel over rows that a step has whole: K and V are read where the model put them.

    No row is filled up, and nothing is copied.
    """

    name = "ragged"
    takes_tables = True
    _function = "lorax_attend"

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the kernel cannot be built or loaded here, or None."""
        return CppAttention.probe(device, dtype)

    def reusable_rows(self) -> WholeRows:
        """Return rows at an address that stays the same."""
        return WholeRows()

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
        query, key, value = numbers_together(query), _heads_together(key), _heads_together(value)
        num_tokens, num_heads, key_dim = query.shape
        _, num_kv_heads, value_dim = value.shape
        rows = _rows_of(metadata)
        if not (
            query.dtype is key.dtype is value.dtype is torch.float32
            and key.shape == (num_tokens, num_kv_heads, key_dim)
            and num_tokens == len(value) == rows.num_tokens
        ):
            shapes = (tuple(each.shape) for each in (query, key, value))
            raise ValueError(f"Q, K and V do not fit: {', '.join(map(str, shapes))}")
        if spec.bias is not None:
            _refuse_other_heads(spec.bias, (num_heads, num_kv_heads, key_dim))
        output = query.new_empty(num_tokens, num_heads, value_dim)
        attend_kernel(self._function, _OF_ALL)(
            PACK_ATTEND(
                query.data_ptr(), query.stride(0), query.stride(1),
                key.data_ptr(), value.data_ptr(), key.stride(0), value.stride(0),
                output.data_ptr(), num_heads * value_dim,
                num_heads, num_kv_heads, key_dim, value_dim, _ONE_BLOCK,
                spec.scaling, spec.window or 0, 0, spec.softcap or 0.0, 0,
                torch.get_num_threads(), rows.address,
                *_bias_fields(spec.bias, rows, metadata),
            )
        )  # fmt: skip
        return output


class RaggedTileAttention(RaggedAttention):
    """The same, with rows of many tokens on matrix tiles (AMX)."""

    name = "ragged_tiles"
    _function = "lorax_attend_on_tiles"

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs what ``tiles`` needs."""
        return TileAttention.probe(device, dtype)


def encoder_attention(device: torch.device, dtype: torch.dtype) -> WholeAttention:
    """Return what computes the attention of encoders best here."""
    for backend in (RaggedTileAttention, RaggedAttention):
        if backend.probe(device, dtype) is None:
            return backend()
    return WholeAttention()


def _rows_of(metadata: StepMetadata) -> WholeRows:
    """Return what the kernel is told of the rows; made in the first layer of a step."""
    if _ROWS not in metadata.scratch:
        rows = WholeRows()
        rows.fill(metadata.query_lens, metadata.query_lens, None)
        metadata.scratch[_ROWS] = rows
    found: WholeRows = metadata.scratch[_ROWS]
    return found


class _BiasTables(NamedTuple):
    """A bias as the kernel reads it, and where its fields lie."""

    bias: RelativeBias
    tables: tuple[torch.Tensor | None, ...]
    fields: tuple[int, ...]

    @classmethod
    def of(cls, bias: RelativeBias, rows: WholeRows) -> _BiasTables:
        """Make them for some rows: whole vectors are read, and tokens follow each other."""
        distances = bias.by_distance if bias.by_distance is not None else bias.places
        assert distances is not None, "a bias without distances adds nothing"
        by_distance = None if bias.by_distance is None else _with_room(bias.by_distance)
        of_tokens = [
            None if each is None else each.contiguous() for each in (bias.of_query, bias.of_key)
        ]
        places = bias.places
        # What is right already is no operation, which a recording would repeat.
        if places is not None and not (places.dtype is torch.int32 and places.is_contiguous()):
            places = places.int().contiguous()
        by_products = [
            None if each is None else _padded(each) for each in (bias.key_table, bias.query_table)
        ]
        tables = (by_distance, *of_tokens, places, *by_products)
        shape = next((each.shape for each in of_tokens if each is not None), (0, 0, 0))
        by_distance_at, of_query_at, of_key_at, places_at, *products_at = (
            0 if each is None else each.data_ptr() for each in tables
        )
        width = next((each.stride(1) for each in by_products if each is not None), 0)
        stride = 0 if by_distance is None else by_distance.stride(0)
        centre = distances.shape[-1] // 2
        rows.fit(centre + 1)
        if shape[1] not in (0, rows.num_tokens):
            raise ValueError(f"a bias of {shape[1]} tokens does not fit {rows.num_tokens}")
        of_tokens_at = (of_query_at, of_key_at, places_at, shape[2])
        fields = (by_distance_at, stride, centre, *of_tokens_at, *products_at, width)
        return cls(bias, tables, fields)


def _refuse_other_heads(bias: RelativeBias, heads: tuple[int, int, int]) -> None:
    """Raise ValueError for tables of other heads than there are: of queries, of keys, their width."""
    num_heads, num_kv_heads, key_dim = heads
    for table in (bias.key_table, bias.query_table):
        if table is None:
            continue
        if num_heads != num_kv_heads or table.shape[:2] != (num_heads, key_dim):
            raise ValueError(f"a table of {tuple(table.shape)} does not fit heads of {heads}")


def _padded(table: torch.Tensor) -> torch.Tensor:
    """Return a table whose rows are whole vectors; one that is already stays where it is."""
    missing = -table.shape[2] % _MOST_LANES
    return table if not missing and table.is_contiguous() else pad(table, (0, missing)).contiguous()


def _with_room(by_distance: torch.Tensor) -> torch.Tensor:
    """Return numbers behind which a vector may be read; made once of each tensor, which stays as it is."""
    if by_distance not in _WITH_ROOM:
        _WITH_ROOM[by_distance] = pad(by_distance.float(), (0, _MOST_LANES)).contiguous()
    found: torch.Tensor = _WITH_ROOM[by_distance]
    return found


def _bias_fields(
    bias: RelativeBias | None, rows: WholeRows, metadata: StepMetadata
) -> tuple[int, ...]:
    """Return what the kernel is told of a bias; layers that have the same one share what is made of it."""
    if bias is None:
        return NO_BIAS
    made: _BiasTables | None = metadata.scratch.get(_BIAS)
    if made is None or made.bias is not bias:
        made = metadata.scratch[_BIAS] = _BiasTables.of(bias, rows)
    return made.fields


def _heads_together(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose heads lie one behind the other in each token."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
