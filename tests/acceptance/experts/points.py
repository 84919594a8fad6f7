"""The points of the list."""

from __future__ import annotations

from tests.acceptance.experts import demo, large, parity, speed
from tests.acceptance.harness import Point

POINTS = [
    Point(
        "1",
        "eight adapters of each family with base rows, chunks, preemption: PEFT's logits, 1 and 3 ranks",
        parity.point_families,
    ),
    Point(
        "1s",
        "three families served, drafts on, eight adapters at once: PEFT's tokens, 1 and 3 ranks",
        parity.point_served,
    ),
    Point("1f", "planted faults are found by the tests", parity.point_planted),
    Point("2", "what target_parameters reach in transformers' families", parity.point_shapes),
    Point("3", "what expert adapters add to a step, by their bytes", speed.point_added),
    Point("3t", "the kernels compile for sm_90, without spills", speed.point_kernels),
    Point("2d", "the demo mixture and its adapter, trained and served", demo.point_demo),
    Point("4", "an adapter of 2 GB loads beside 8 streams", large.point_large),
]
