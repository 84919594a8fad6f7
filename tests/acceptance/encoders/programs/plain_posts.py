"""What programs compare clients with: the server asked without any; the standard library alone."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from typing import Any

TEXTS = ["A cat sleeps on the sofa.", "Ein Kätzchen schläft.", "Shares fell by two per cent."]
TOLERANCE = 1e-5


def post(url: str, route: str, body: dict[str, Any]) -> Any:
    """Return the answer to a body."""
    request = urllib.request.Request(
        url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def vectors(url: str, texts: Sequence[str], **fields: Any) -> list[list[float]]:
    """Return the vectors of texts."""
    answer = post(url, "/v1/embeddings", {"input": list(texts), **fields})
    return [each["embedding"] for each in answer["data"]]


def near(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> bool:
    """Tell whether vectors are the same, but for the order of sums in another batch."""
    return len(found) == len(expected) and all(
        len(one) == len(other) and max(abs(a - b) for a, b in zip(one, other)) < TOLERANCE
        for one, other in zip(found, expected)
    )
