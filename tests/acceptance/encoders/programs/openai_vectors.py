"""openai's embeddings, unmodified: ``python openai_vectors.py URL MOOD_URL NAMES_URL``."""

from __future__ import annotations

import asyncio
import sys

from checks import check, raises, raises_later, same
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from plain_posts import TEXTS, near, post, vectors


def forms(client: OpenAI, url: str, model: str) -> None:
    """Floats and base64 (the client's own choice), lists and one text, fewer dimensions."""
    expected = vectors(url, TEXTS, model=model)
    for named in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model=model, input=TEXTS, **named)
        found = [each.embedding for each in answer.data]
        if named.get("encoding_format") == "base64":
            check(f"{model}: base64 is text", all(isinstance(each, str) for each in found))
            continue
        check(f"{model}: {named or 'its own choice'}", near(found, expected))
        same(f"{model}: in order", [each.index for each in answer.data], [0, 1, 2])
        check(f"{model}: usage", answer.usage.prompt_tokens > len(TEXTS), answer.usage)
    one = client.embeddings.create(model=model, input=TEXTS[0])
    check(f"{model}: one text", near([one.data[0].embedding], expected[:1]))
    few = client.embeddings.create(model=model, input=TEXTS[0], dimensions=16).data[0].embedding
    same(f"{model}: dimensions", len(few), 16)
    check(f"{model}: of length one", abs(sum(each * each for each in few) - 1) < 1e-4, few)


def ids(client: OpenAI, url: str) -> None:
    """Token ids in place of texts."""
    known = [[each["id"] for each in post(url, "/tokenize", {"inputs": text})] for text in TEXTS]
    answer = client.embeddings.create(model="", input=known)
    found = [each.embedding for each in answer.data]
    check("lists of ids", near(found, vectors(url, TEXTS)))
    one = client.embeddings.create(model="", input=known[0])
    check("one list of ids", near([one.data[0].embedding], found[:1]))


def refusals(client: OpenAI) -> None:
    """Each error is the exception that fits."""
    asked = {"model": "", "input": TEXTS}
    for name, fields in (
        ("too many dimensions", {"dimensions": 385}), ("too long", {"input": "word " * 600}),
        ("no input", {"input": []}), ("an empty text", {"input": ""}), ("no such id", {"input": [10**6]}),
    ):  # fmt: skip
        error = raises(name, BadRequestError, client.embeddings.create, **{**asked, **fields})
        check(f"{name}: in words", len(error.message) > 20, error)
    raises("no such model", NotFoundError, client.embeddings.create, model="local:no", input="x")


async def asynchronous(url: str) -> None:
    """Several calls at once."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        calls = [client.embeddings.create(model=each, input=TEXTS) for each in ("", "local:mood")]
        answers = await asyncio.gather(*calls)
        for model, answer in zip(("", "local:mood"), answers):
            found = [each.embedding for each in answer.data]
            check(f"async {model!r}", near(found, vectors(url, TEXTS, model=model)))
        await raises_later(
            "async: too many dimensions", BadRequestError, client.embeddings.create,
            model="", input="x", dimensions=10**4,
        )  # fmt: skip


def main() -> None:
    """Check all."""
    url = sys.argv[1]
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    for model in ("", "local:mood"):
        forms(client, url, model)
    check(
        "adapters have others",
        not near(*(vectors(url, TEXTS, model=m) for m in ("", "local:mood"))),
    )
    ids(client, url)
    refusals(client)
    asyncio.run(asynchronous(url))


if __name__ == "__main__":
    main()
