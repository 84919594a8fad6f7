"""The ways to draw, by name: one specification for all."""

from __future__ import annotations

import functools

from lorax_shard.sampling.batched import draw_batch
from lorax_shard.sampling.kernel import DrawKernel
from lorax_shard.sampling.reference import sample_each
from lorax_shard.sampling.sampler import SamplesRows

NAMES = ("kernel", "tensors", "rows")


@functools.cache
def method_of(name: str) -> SamplesRows:
    """Return a way to draw; OSError says why it cannot be had here."""
    if name == "kernel":
        if reason := DrawKernel.probe():
            raise OSError(reason)
        return DrawKernel()
    return draw_batch if name == "tensors" else sample_each
