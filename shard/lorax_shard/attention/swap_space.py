"""Host memory for KV blocks that leave the pool, and the copies there and back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from lorax_shard.attention.kv_cache import PagedCache
from lorax_shard.transfer import to_device

# Pinned memory comes in powers of two: host blocks are taken from slabs of this many bytes, so
# that less than a block of each is lost.
_SLAB_BYTES = 256 << 20
# Blocks that travel together pass through device memory of this many bytes.
_STAGING_BYTES = 32 << 20
# What the link is measured with.
_MEASURED_BLOCKS = 8


class SwapSpace:
    """Blocks in host memory, each with a block's K and V of all layers side by side.

    On a GPU the memory is pinned, and copies run on a stream of their own. Two events order them
    with the steps, whose stream is the current one: a copy begins after all that was computed
    before it, and what is computed after it waits until the pool's blocks were read, or
    written. So the way over the link out of the device runs beside the forward pass; the way
    back does not, since that reads what comes.

    Between themselves copies run in their order: a host block may be read as soon as the copy
    that fills it was asked for, and be filled anew as soon as it was.

    Args:
        cache: the pool.
        num_blocks: blocks in host memory.
    """

    def __init__(self, cache: PagedCache, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._parts = cache.raw_blocks()
        self._block_bytes = sum(part.shape[1] for part in self._parts)
        device = self._parts[0].device
        self._device = device
        self._slabs, self._slab_blocks = _make_slabs(num_blocks, self._block_bytes, device)
        self._staged = max(1, min(_STAGING_BYTES // self._block_bytes, num_blocks))
        self._staging = torch.empty(
            (self._staged, self._block_bytes), dtype=torch.uint8, device=device
        )
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy_out(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy blocks of the pool to host blocks."""
        with self._beside_steps() as steps:
            for start in range(0, len(blocks), self._staged):
                some = self._index(blocks[start : start + self._staged])
                self._gather(some)
                if start + self._staged >= len(blocks) and steps is not None:
                    # The pool is read; what is left is the way over the link.
                    steps.wait_event(torch.cuda.current_stream(self._device).record_event())
                for row, host_block in enumerate(host_blocks[start : start + self._staged]):
                    self._host(host_block).copy_(self._staging[row], non_blocking=True)

    def copy_in(self, host_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy host blocks to blocks of the pool."""
        with self._beside_steps() as steps:
            for start in range(0, len(blocks), self._staged):
                for row, host_block in enumerate(host_blocks[start : start + self._staged]):
                    self._staging[row].copy_(self._host(host_block), non_blocking=True)
                self._scatter(self._index(blocks[start : start + self._staged]))
            if steps is not None:
                steps.wait_event(torch.cuda.current_stream(self._device).record_event())

    def measure_block_s(self, num_pool_blocks: int) -> float:
        """Return the seconds that a block takes one way, on average; writes over blocks."""
        num = min(_MEASURED_BLOCKS, self.num_blocks, num_pool_blocks)
        blocks = list(range(num))
        # The first time is not like the others: pages are touched, kernels loaded.
        seconds = math.inf
        for _ in range(3):
            self._wait()
            started = time.perf_counter()
            self.copy_out(blocks, blocks)
            self.copy_in(blocks, blocks)
            self._wait()
            seconds = min(seconds, time.perf_counter() - started)
        return seconds / (2 * num)

    def _wait(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self._device)

    @contextmanager
    def _beside_steps(self) -> Iterator[torch.cuda.Stream | None]:
        """Within, what is launched comes after the steps so far; yields their stream, if any."""
        if self._stream is None:
            with torch.inference_mode():
                yield None
            return
        steps = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(steps)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield steps

    def _index(self, blocks: Sequence[int]) -> torch.Tensor:
        # Made on the stream that uses it: its memory is not given away before it was read.
        return to_device(torch.tensor(list(blocks)), self._device)

    def _gather(self, blocks: torch.Tensor) -> None:
        for part, place in self._places(len(blocks)):
            place.copy_(part.index_select(0, blocks))

    def _scatter(self, blocks: torch.Tensor) -> None:
        for part, place in self._places(len(blocks)):
            part.index_copy_(0, blocks, place)

    def _places(self, num: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each part of the pool with its columns of the first staged blocks."""
        start = 0
        for part in self._parts:
            stop = start + part.shape[1]
            yield part, self._staging[:num, start:stop]
            start = stop

    def _host(self, block: int) -> torch.Tensor:
        return self._slabs[block // self._slab_blocks][block % self._slab_blocks]


def _make_slabs(
    num_blocks: int, block_bytes: int, device: torch.device
) -> tuple[list[torch.Tensor], int]:
    """Return host memory for blocks, and how many there are in each piece of it."""
    if device.type != "cuda":
        # Zeroed pages of the system: they are taken when they are first used.
        raw = np.zeros((num_blocks, block_bytes), dtype=np.uint8)
        return [torch.from_numpy(raw)], num_blocks
    per_slab = max(1, min(_SLAB_BYTES // block_bytes, num_blocks))
    slabs = [
        torch.empty(
            (min(per_slab, num_blocks - start), block_bytes), dtype=torch.uint8, pin_memory=True
        )
        for start in range(0, num_blocks, per_slab)
    ]
    return slabs, per_slab
