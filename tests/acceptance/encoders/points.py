"""The points of the list."""

from __future__ import annotations

from tests.acceptance.encoders import clients, invoked, scores, speed
from tests.acceptance.encoders.vectors import point_vectors
from tests.acceptance.harness import Point

POINTS = [
    Point(
        "1",
        "vectors are sentence-transformers' own: every pooling, together and alone, 1 and 3 ranks",
        point_vectors,
    ),
    Point(
        "1c",
        "30 adapters with different heads at once are PEFT's, 1 and 3 ranks",
        scores.point_scores,
    ),
    Point("1r", "pairs of a cross-encoder are transformers' own", scores.point_ranking),
    *clients.POINTS,
    Point("3", "mixed lengths beside sentence-transformers, ONNX, infinity-emb", speed.point_rates),
    Point("3f", "one text through 20 adapters, against one", speed.point_fanned_out),
    Point("3g", "one text through 20 causal adapters that it invokes", invoked.point_invoked),
    Point("4", "chats beside 50 vectors a second of the same model", speed.point_beside_chats),
    Point("5", "planted faults are found by the tests", scores.point_planted),
]
