"""huggingface_hub's tasks, unmodified: ``python huggingface_tasks.py URL MOOD_URL NAMES_URL``.

A task's URL is where it is sent. The last two servers have adapters with heads by default.
"""

from __future__ import annotations

import asyncio
import sys

from checks import check, raises, same
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from plain_posts import TEXTS, near, vectors

SENTENCE = "Anna moved from Paris to New York."


def features(url: str) -> None:
    """Vectors, as TEI answers them."""
    client = InferenceClient(f"{url}/embed")
    expected = vectors(url, TEXTS)
    found = client.feature_extraction(TEXTS)
    check("several texts", near(found.tolist(), expected))
    one = client.feature_extraction(TEXTS[0], normalize=True)
    check("a text", near(one.tolist(), expected[:1]))
    long = client.feature_extraction("word " * 600, truncate=True, truncation_direction="right")
    same("cut", long.shape, (1, 384))
    raises("too long", HfHubHTTPError, client.feature_extraction, "word " * 600, truncate=False)


def labels(url: str) -> None:
    """The label of a text."""
    for route in ("/predict", "/classify"):
        client = InferenceClient(f"{url}{route}")
        for text, label in (
            ("I loved every minute.", "positive"),
            ("It broke at once.", "negative"),
        ):
            found = client.text_classification(text)
            same(f"{route}: {text}", (found.label, found.score > 0.5), (label, True))


def names(url: str) -> None:
    """What a text names."""
    client = InferenceClient(f"{url}/classify")
    found = client.token_classification(SENTENCE, aggregation_strategy="simple")
    words = [(each.entity_group, each.word) for each in found]
    same("names", words, [("PER", "Anna"), ("LOC", "Paris"), ("LOC", "New York")])
    same("their places", [SENTENCE[each.start : each.end] for each in found], [w for _, w in words])
    check("their scores", all(0.5 < each.score <= 1 for each in found), found)
    raises(
        "no labels of texts",
        HfHubHTTPError,
        client.text_classification,
        SENTENCE,
        model=f"{url}/predict",
    )


async def asynchronous(url: str, mood_url: str) -> None:
    """The asynchronous client, several calls at once."""
    async with AsyncInferenceClient() as client:
        vector, label = await asyncio.gather(
            client.feature_extraction(TEXTS, model=f"{url}/embed"),
            client.text_classification("I loved it.", model=f"{mood_url}/predict"),
        )
    check("async: vectors", near(vector.tolist(), vectors(url, TEXTS)))
    same("async: a label", label.label, "positive")


def main() -> None:
    """Check all."""
    url, mood_url, names_url = sys.argv[1:]
    features(url)
    labels(mood_url)
    names(names_url)
    headless = InferenceClient(f"{url}/classify")
    error = raises("no head", HfHubHTTPError, headless.text_classification, "x")
    same("no head: status", error.response.status_code, 422)
    asyncio.run(asynchronous(url, mood_url))


if __name__ == "__main__":
    main()
