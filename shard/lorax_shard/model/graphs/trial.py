"""Whether a graph computes what its launches compute without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from lorax_shard.attention.kv_cache import PagedCache
from lorax_shard.model.interface import PassNumbers

# Blocks of the cache that the rows of a trial read, at least.
_LEAST_BLOCKS = 16
# One row sees so many blocks, as far as it may, so that its context is split; the others few.
_LONG_CONTEXT = 128


class GraphDiffersError(Exception):
    """A replay gave other bits than the same launches."""


class GraphTrial:
    """Rows over the first blocks of a cache in which nothing is yet; other ones each time."""

    def __init__(self, cache: PagedCache, num_rows: int, max_blocks: int) -> None:
        """Take up to ``num_rows`` rows: one in four is left to padding, where there are some."""
        block_size = cache.block_size
        least = max(_LEAST_BLOCKS, -(-num_rows // block_size))
        self._num_blocks = min(cache.num_blocks, least)
        self.num_rows = min(num_rows - num_rows // 4, self._num_blocks * block_size)
        self._cache, self._max_blocks = cache, max_blocks
        self._random = np.random.default_rng(num_rows)
        self._pools: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []

    @contextmanager
    def filled_cache(self) -> Iterator[None]:
        """Within, the blocks hold numbers; zeros afterwards."""
        generator = None
        for pools in (self._cache.keys, self._cache.values):
            for pool in pools.values():
                part = pool[: self._num_blocks]
                generator = generator or torch.Generator(pool.device).manual_seed(1)
                part.copy_(torch.randn(part.shape, generator=generator, device=pool.device))
                self._pools.append(part)
        self._before = [part.clone() for part in self._pools]
        try:
            yield
        finally:
            for part in self._pools:
                part.zero_()
            self._pools.clear()
            self._before.clear()

    def numbers(self, slots: Sequence[int], vocab_size: int) -> PassNumbers:
        """Return a step: each row writes to a place of its own and reads what others wrote too."""
        count, block_size = self.num_rows, self._cache.block_size
        widest = self._random.integers(0, min(self._max_blocks, 4), count)
        widest[self._random.integers(count)] = min(self._max_blocks, _LONG_CONTEXT) - 1
        width = int(widest.max()) + 1
        tables = self._random.integers(0, self._num_blocks, (count, width))
        place = self._random.permutation(self._num_blocks * block_size)[:count]
        tables[np.arange(count), widest] = place // block_size
        positions = widest * block_size + place % block_size
        own = [None, *slots]
        return PassNumbers(
            input_ids=self._random.integers(0, vocab_size, count),
            positions=positions,
            kv_slots=place,
            tables=tables,
            query_lens=[1] * count,
            context_lens=(positions + 1).tolist(),
            num_decode_rows=count,
            logit_rows=np.arange(count),
            slots=[own[each] for each in self._random.integers(0, len(own), count)],
            slot_lens=[1] * count,
        )

    def compare(
        self, replay: Callable[[], None], launch: Callable[[], None], logits: torch.Tensor
    ) -> None:
        """Raise GraphDiffersError unless a replay leaves the same ``logits`` and cache as launches."""
        found = self._results(replay, logits)
        expected = self._results(launch, logits)
        if not all(map(torch.equal, found, expected)):
            raise GraphDiffersError("its first replay gave other bits than the same launches")
        if not torch.isfinite(logits).all():
            raise GraphDiffersError("its first replay gave logits that are no numbers")

    def _results(self, call: Callable[[], None], logits: torch.Tensor) -> list[torch.Tensor]:
        for part, before in zip(self._pools, self._before, strict=True):
            part.copy_(before)
        logits.fill_(float("nan"))
        call()
        return [_bits(each).clone() for each in (logits, *self._pools)]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as bytes: a NaN is equal to itself."""
    return tensor.contiguous().view(torch.uint8)
