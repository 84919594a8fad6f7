"""lorax-client's embed and classify, unmodified: ``python lorax_heads.py URL MOOD_URL NAMES_URL``.

These calls name no adapter: the last two servers have adapters with heads by default.
"""

from __future__ import annotations

import asyncio
import sys

from checks import check, raises, raises_later, same
from lorax import AsyncClient, Client
from lorax.errors import ValidationError
from plain_posts import TEXTS, near, vectors

SENTENCE = "Anna moved from Paris to New York."
FOUND = [("PER", "Anna"), ("LOC", "Paris"), ("LOC", "New York")]


def named(answer: object) -> list[tuple[str, str]]:
    """Return what an answer names."""
    return [(each["entity_group"], each["word"]) for each in answer.entities]


def classified(url: str, mood_url: str) -> None:
    """Entities of a text and of several; labels in their place where a head is for texts."""
    client = Client(url, timeout=300)
    same("classify", named(client.classify(SENTENCE)), FOUND)
    (nothing, something) = client.classify_batch(["It rained.", SENTENCE])
    same("classify_batch", (named(nothing), named(something)), ([], FOUND))
    first = client.classify(SENTENCE).entities[0]
    same("where it stands", (first["start"], first["end"]), (0, 4))
    labels = Client(mood_url, timeout=300).classify("I loved it.").entities
    same("labels", [each["label"] for each in labels], ["positive", "negative"])


async def asynchronous(url: str) -> None:
    """The asynchronous client, several calls at once; its classify cannot read LoRAX's own answer."""
    client = AsyncClient(url, timeout=300)
    answers = await asyncio.gather(*(client.embed(text) for text in TEXTS))
    check("async embed", near([each.embeddings for each in answers], vectors(url, TEXTS)))
    await raises_later("async: too long", ValidationError, client.embed, "word " * 600)


def main() -> None:
    """Check all."""
    url, mood_url, names_url = sys.argv[1:]
    client = Client(url, timeout=300)
    found = [client.embed(text).embeddings for text in TEXTS]
    check("embed", near(found, vectors(url, TEXTS)))
    raises("too long", ValidationError, client.embed, "word " * 600)
    raises("no head", ValidationError, client.classify, SENTENCE)
    classified(names_url, mood_url)
    asyncio.run(asynchronous(url))


if __name__ == "__main__":
    main()
