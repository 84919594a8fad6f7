"""Whether a program computes what the model's code does, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from lorax_shard.attention.kv_cache import PagedCache
from lorax_shard.model.interface import PassNumbers
from lorax_shard.model.programs.recorder import NotAProgramError
from lorax_shard.model.programs.scaled import Size

# Other sizes than those of the recordings: one token, chunks and single tokens together, one row in
# a chunk, and a chunk that nobody asks logits of.
SIZES = (Size(1, 1), Size(29, 7), Size(20, 1), Size(5, 0))
FEW_SIZES = SIZES[:2]
_LEAST_BLOCKS = 16


class ProgramTrial:
    """Passes over the first blocks of a cache in which nothing is yet; other ones each time."""

    def __init__(
        self, cache: PagedCache, vocab_size: int, max_context: int, *, is_whole: bool = False
    ) -> None:
        """``is_whole``: no row has a context before the pass."""
        self._is_whole = is_whole
        self._cache, self._vocab_size = cache, vocab_size
        self._num_blocks = min(cache.num_blocks, _LEAST_BLOCKS)
        self._max_context = min(max_context, self._num_blocks * cache.block_size)
        self._random = np.random.default_rng(1)
        self._parts: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []

    @contextmanager
    def filled_cache(self) -> Iterator[None]:
        """Within, the blocks hold numbers; zeros afterwards."""
        generator = torch.Generator().manual_seed(1)
        for pools in (self._cache.keys, self._cache.values):
            for pool in pools.values():
                part = pool[: self._num_blocks]
                part.copy_(torch.randn(part.shape, generator=generator))
                self._parts.append(part)
        self._before = [part.clone() for part in self._parts]
        try:
            yield
        finally:
            for part in self._parts:
                part.zero_()
            self._parts.clear()
            self._before.clear()

    def numbers(self, size: Size, slots: Sequence[int]) -> PassNumbers:
        """Return a pass of this size: some rows of one token, and a chunk; contexts overlap."""
        block_size, room = self._cache.block_size, self._max_context
        num_tokens = min(size.tokens, room)
        num_decoded = min(num_tokens - 1, max(0, size.logits - 1))
        query_lens = [1] * num_decoded + [num_tokens - num_decoded]
        most = [0 if self._is_whole else room - length for length in query_lens]
        context_lens = [
            length + int(self._random.integers(0, rest + 1))
            for length, rest in zip(query_lens, most, strict=True)
        ]
        positions = np.concatenate(
            [np.arange(end - num, end) for num, end in zip(query_lens, context_lens, strict=True)]
        )
        # Each token has a place of its own; tables name any block.
        places = self._random.permutation(self._num_blocks * block_size)[:num_tokens]
        own = [None, *slots]
        own_of_rows = [
            own[each % len(own)] for each in self._random.integers(1, 99, len(query_lens))
        ]
        # With adapters a row at least has one.
        own_of_rows[-1] = own_of_rows[-1] if own_of_rows[-1] is not None else own[-1]
        width = -(-max(context_lens) // block_size)
        return PassNumbers(
            input_ids=self._random.integers(0, self._vocab_size, num_tokens),
            positions=positions,
            kv_slots=places,
            tables=self._random.integers(0, self._num_blocks, (len(query_lens), width)),
            query_lens=query_lens,
            context_lens=context_lens,
            num_decode_rows=sum(length == 1 for length in query_lens),
            logit_rows=np.sort(self._random.permutation(num_tokens)[: size.logits]),
            slots=own_of_rows,
            slot_lens=query_lens,
            segments=self._random.integers(0, 2, num_tokens) if self._is_whole else None,
        )

    def compare(
        self,
        run: Callable[[PassNumbers], torch.Tensor | None],
        launch: Callable[[PassNumbers], torch.Tensor],
        slots: Sequence[int],
        sizes: Sequence[Size] = SIZES,
    ) -> None:
        """Raise NotAProgramError unless passes leave the same logits and cache as launches."""
        for size in sizes:
            numbers = self.numbers(size, slots)
            found = self._results(run, numbers)
            expected = self._results(launch, numbers)
            if not all(map(_is_same, found, expected)):
                raise NotAProgramError(f"a pass of {size.tokens} tokens gave other bits")

    def _results(
        self, call: Callable[[PassNumbers], torch.Tensor | None], numbers: PassNumbers
    ) -> list[torch.Tensor]:
        for part, before in zip(self._parts, self._before, strict=True):
            part.copy_(before)
        logits = call(numbers)
        assert logits is not None
        return [each.clone() for each in (logits, *self._parts)]


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # As integers: a NaN is equal to itself.
    return found.shape == expected.shape and torch.equal(
        found.view(torch.int32), expected.view(torch.int32)
    )
