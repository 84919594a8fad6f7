"""Into how many parts the contexts of a step are split, so that a GPU's processors end together.

What is split is a tile: some neighbouring queries of one row, a decode row's only one. Programs that
read more than others keep a whole step waiting, and a short context that is split costs more than it
gains. So a split is about as long for every tile of a step: what each processor would read if all of
them read equally much. A long row among short ones gets many splits, the short ones one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorax_shard.attention.backend import AttentionSpec

_IntArray = NDArray[np.int64]

# Splits of one tile at most.
MOST_SPLITS = 128


class SplitRule(NamedTuple):
    """How far kernels of a kind are split."""

    # Programs for each processor at equal lengths. Rounding makes up to a third more of it, as many as
    # are on a processor at once: none waits for others to end.
    per_processor: int
    # Keys that a split has at least to read, but for its tile's last ones.
    least_keys: int
    # Tiles are split that read as many times what a processor would.
    worth: int


DECODE = SplitRule(3, 64, 1)
# Programs are larger, and parts are more to write and to read again: what a prompt's later tiles
# read more than its first ones is not worth it.
PROMPT = SplitRule(1, 256, 3)


class TileSplits(NamedTuple):
    """The splits of all tiles, those that read most first, those of a tile one after the other.

    A split leaves its parts at ``block_q`` places, one for each query.
    """

    # S x 4: of each its row, its tile's first query in the row, its number in the tile, of how many.
    splits: _IntArray
    # T x 2: of each query the place in its tile's first split, and how many splits there are.
    queries: _IntArray

    @property
    def num(self) -> int:
        """How many there are."""
        return len(self.splits)

    @property
    def is_split(self) -> bool:
        """Whether some tile has several."""
        return bool((self.splits[:, 3] > 1).any())


class _Tiles(NamedTuple):
    """Tiles of rows: the row of each, its first query in the row, and how many it has."""

    row: _IntArray
    first: _IntArray
    num: _IntArray


def fixed(query_lens: Sequence[int] | _IntArray, block_q: int, num_splits: int) -> TileSplits:
    """Return equally many splits for each tile, in the order of the rows."""
    tiles = _tiles(query_lens, block_q)
    order = np.arange(len(tiles.row))
    return _lay_out(tiles, block_q, np.full(len(order), num_splits), order)


def by_length(
    query_lens: Sequence[int] | _IntArray,
    context_lens: Sequence[int] | _IntArray,
    block_q: int,
    spec: AttentionSpec,
    rule: SplitRule,
    *,
    programs: int,
    num_processors: int,
) -> TileSplits:
    """Return splits of about equal length, for ``programs`` of each split."""
    tiles = _tiles(query_lens, block_q)
    keys = _keys(tiles, np.array(context_lens) - np.array(query_lens), spec)
    equal = -(-int(keys.sum()) * programs // (rule.per_processor * num_processors))
    each = max(rule.least_keys, equal)
    counts = np.clip((keys + each // 2) // each, 1, MOST_SPLITS)
    counts[keys < rule.worth * each] = 1
    return _lay_out(tiles, block_q, counts, np.argsort(-keys // counts, kind="stable"))


def most(num_tiles: int, rule: SplitRule, programs: int, num_processors: int) -> int:
    """Return how many splits ``by_length`` makes of so many tiles at most, whatever their lengths.

    A tile of ``keys`` has at most ``1 + keys / each``, where ``each`` is not below the sum of all
    keys over ``rule.per_processor * num_processors / programs``.
    """
    return num_tiles + -(-rule.per_processor * num_processors // programs)


def _tiles(query_lens: Sequence[int] | _IntArray, block_q: int) -> _Tiles:
    lens = np.array(query_lens, dtype=np.int64)
    of_rows = -(-lens // block_q)
    row = np.repeat(np.arange(len(lens)), of_rows)
    first = (np.arange(len(row)) - np.repeat(np.cumsum(of_rows) - of_rows, of_rows)) * block_q
    return _Tiles(row, first, np.minimum(lens[row] - first, block_q))


def _keys(tiles: _Tiles, starts: _IntArray, spec: AttentionSpec) -> _IntArray:
    """Return how many keys the queries of each tile see together; rows' own begin at ``starts``."""
    position = starts[tiles.row] + tiles.first
    seen = np.zeros_like(position)
    if spec.window is not None:
        seen = np.maximum(seen, position - spec.window + 1)
    if spec.chunk is not None:
        seen = np.maximum(seen, position - position % spec.chunk)
    return position + tiles.num - seen


def _lay_out(tiles: _Tiles, block_q: int, counts: _IntArray, order: _IntArray) -> TileSplits:
    """Return ``counts[tile]`` splits of each tile, tile after tile in ``order``."""
    in_order = counts[order]
    firsts = np.empty_like(counts)
    firsts[order] = np.cumsum(in_order) - in_order
    tile = np.repeat(order, in_order)
    number = np.arange(len(tile)) - firsts[tile]
    columns = (tiles.row[tile], tiles.first[tile], number, counts[tile])
    # Of each query: its tile, and its number there.
    of_tile = np.repeat(np.arange(len(counts)), tiles.num)
    within = np.arange(len(of_tile)) - np.repeat(np.cumsum(tiles.num) - tiles.num, tiles.num)
    places = firsts[of_tile] * block_q + within
    return TileSplits(np.stack(columns, axis=1), np.stack([places, counts[of_tile]], axis=1))
