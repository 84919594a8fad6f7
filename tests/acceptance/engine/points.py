"""The points of the list: what a step of a shard computes, and what it costs."""

from __future__ import annotations

from tests.acceptance.engine import drafts, kernels, overlap, sampling

POINTS = [
    *overlap.POINTS,
    *sampling.POINTS,
    *drafts.POINTS,
    *kernels.POINTS,
]
