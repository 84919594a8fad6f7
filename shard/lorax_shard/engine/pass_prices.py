"""What forward passes take, by how many positions they compute: measured once, at the warm-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_contract.step import (
    BlockId,
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
    WarmupSpec,
)
from lorax_shard.engine.forward import run_pass
from lorax_shard.engine.inputs import RowWork
from lorax_shard.engine.row_draws import draw
from lorax_shard.engine.rows import ResidentBatch, make_row

if TYPE_CHECKING:
    from lorax_shard.model.interface import PagedModel
    from lorax_shard.parallel.group import RankGroup
    from lorax_shard.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

Seconds = NDArray[np.float64]

# Positions of the passes that are measured, as far as a step may have so many; what lies between
# is interpolated, and what is beyond goes on as the last two do.
_SIZES = (1, 4, 8, 16, 32, 64, 96)
# Each is measured so often at least, and again while the time has not passed. The quickest counts:
# what disturbs a pass only makes it longer.
_LEAST_ROUNDS, _MOST_ROUNDS, _ENOUGH_S = 2, 8, 3.0
# The part of a step's fixed time that is spared where a row needs a step less, as others do.
_SHARED = 0.5
# Tokens in the cache of each row.
_CONTEXT = 128


@dataclass(frozen=True, slots=True)
class PassPrices:
    """Seconds of passes of so many positions: each of a row of its own, or drafts of few rows."""

    sizes: tuple[int, ...]
    single_s: tuple[float, ...]
    drafted_s: tuple[float, ...]

    def added_s(self, num_positions: int, num_drafted: NDArray[np.int64]) -> Seconds:
        """Return what so many drafted tokens add to a pass of so many positions."""
        plain_s = self._at(self.single_s, num_positions)
        drafted_s = self._at(self.drafted_s, num_positions + num_drafted)
        return np.where(num_drafted > 0, np.maximum(drafted_s - plain_s, 0.0), 0.0)

    def spared_s(self, num_rows: int) -> float:
        """Return what is spared where one of so many rows needs a step less.

        What it adds to the step, and some of its part in what the step takes in any case. It has
        no more of that where rows are many: when they end earlier than others, these go on in
        steps that are not full.
        """
        whole_s = float(self._at(self.single_s, num_rows))
        if num_rows == 1:
            return whole_s
        added_s = whole_s - float(self._at(self.single_s, num_rows - 1))
        return added_s + _SHARED * max(whole_s / num_rows - added_s, 0.0)

    def __str__(self) -> str:
        each = zip(self.sizes, self.single_s, self.drafted_s, strict=True)
        return ", ".join(f"{num}: {1e3 * a:.1f} ({1e3 * b:.1f} as drafts)" for num, a, b in each)

    def _at(self, prices: tuple[float, ...], num: int | NDArray[np.int64]) -> Seconds:
        # A pass takes no longer than a larger one; what was measured so was disturbed.
        sizes, values = np.array(self.sizes), np.minimum.accumulate(prices[::-1])[::-1]
        slope = values[0] / sizes[0]
        if len(sizes) > 1:
            slope = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
        beyond = np.maximum(np.asarray(num) - sizes[-1], 0.0)
        return np.asarray(np.interp(num, sizes, values) + slope * beyond)


class PassTimer:
    """Runs passes over a warm model's own cache, in which nothing is yet.

    Args:
        sampler: None: another rank draws, and its clock counts.
        group: the ranks that compute each pass together.
    """

    def __init__(
        self, model: PagedModel, sampler: Sampler | None, group: RankGroup | None,
        *, num_blocks: int, block_size: int,
    ) -> None:  # fmt: skip
        self._model, self._sampler, self._group = model, sampler, group
        self._num_blocks, self._block_size = num_blocks, block_size

    def measure(self, spec: WarmupSpec, max_draft: int) -> PassPrices:
        """Return what passes take, the same on all ranks."""
        most = max(1, min(spec.max_step_tokens, spec.max_rows))
        sizes = tuple(size for size in _SIZES if size <= most)
        context = min(_CONTEXT, spec.max_total_tokens - 1, self._num_blocks * self._block_size)
        longest = min(1 + max_draft, max(context, 1))
        # One token of each row, or a whole draft of each.
        shapes = [*([1] * size for size in sizes), *(_drafts(size, longest) for size in sizes)]
        best = self._of_first_rank(self._best_of_rounds(shapes, max(context, 1)))
        prices = PassPrices(sizes, tuple(best[: len(sizes)]), tuple(best[len(sizes) :]))
        logger.info("milliseconds of passes, by their positions: %s", prices)
        return prices

    def _best_of_rounds(self, shapes: list[list[int]], context: int) -> list[float]:
        started, rounds = time.perf_counter(), list[list[float]]()
        while len(rounds) < _MOST_ROUNDS:
            rounds.append([self._seconds(shape, context) for shape in shapes])
            (elapsed_s,) = self._of_first_rank([time.perf_counter() - started])
            if len(rounds) >= _LEAST_ROUNDS and elapsed_s > _ENOUGH_S:
                break
        return [min(times) for times in zip(*rounds, strict=True)]

    def _of_first_rank(self, seconds: list[float]) -> list[float]:
        if self._group is None:
            return seconds
        nanoseconds = torch.tensor([round(each * 1e9) for each in seconds])
        return [each / 1e9 for each in self._group.broadcast(nanoseconds).tolist()]

    def _seconds(self, lengths: Sequence[int], context: int) -> float:
        """Return what a pass takes whose rows compute so many positions, up to ``context``."""
        batch = ResidentBatch(self._num_blocks, self._block_size)
        # All rows share the blocks of one: what they write does not matter.
        blocks = [BlockId(block) for block in range(-(-context // self._block_size))]
        work = []
        for number, length in enumerate(lengths):
            row = make_row(
                _new_row(number, context - length + 1),
                vocab_size=self._model.vocab_size,
                num_computed=context - length,
            )
            batch.add(row)
            batch.grant(row, blocks)
            work.append(RowWork(row, 1, np.zeros(length - 1, dtype=np.int64)))
        started = time.perf_counter()
        result = run_pass(self._model, batch, work)
        if self._sampler is not None:
            tokens = draw(self._sampler, result).sampled
            assert tokens is not None
            # A device is asked, and has not computed: its time counts, not that of asking.
            tokens.read()
        return time.perf_counter() - started


def _drafts(size: int, length: int) -> list[int]:
    """Return how many positions each row has, those of one first."""
    rest = size % length
    return sorted([*[length] * (size // length), *[rest] * bool(rest)], key=lambda num: num > 1)


def _new_row(number: int, num_tokens: int) -> NewRow:
    spec = RequestSpec(
        request_id=RequestId(number), prompt_ids=[0] * num_tokens, sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=2 * _CONTEXT),
    )  # fmt: skip
    return NewRow(spec, [])
