"""The points of the list."""

from __future__ import annotations

from tests.acceptance.encoders import clients
from tests.acceptance.encoders.vectors import point_vectors
from tests.acceptance.harness import Point

POINTS = [
    Point(
        "1",
        "vectors are sentence-transformers' own: every pooling, together and alone, 1 and 3 ranks",
        point_vectors,
    ),
    *clients.POINTS,
]
