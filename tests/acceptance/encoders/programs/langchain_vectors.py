"""LangChain's OpenAIEmbeddings, unmodified: ``python langchain_vectors.py URL MOOD_URL NAMES_URL``."""

from __future__ import annotations

import asyncio
import sys

from checks import check, raises, same
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from openai import BadRequestError
from plain_posts import TEXTS, near, vectors


def embeddings(url: str, model: str, **named: object) -> OpenAIEmbeddings:
    """Return the client; texts are sent as they are, since their tokens are the server's."""
    return OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key="none", model=model, check_embedding_ctx_length=False, **named
    )


def main() -> None:
    """Check all."""
    url = sys.argv[1]
    for model in ("all-minilm", "local:mood"):
        client, expected = embeddings(url, model), vectors(url, TEXTS, model=model)
        check(f"{model}: documents", near(client.embed_documents(TEXTS), expected))
        check(f"{model}: a query", near([client.embed_query(TEXTS[0])], expected[:1]))
        later = asyncio.run(client.aembed_documents(TEXTS))
        check(f"{model}: async", near(later, expected))
        parts = embeddings(url, model, chunk_size=1).embed_documents(TEXTS)
        check(f"{model}: in parts", near(parts, expected))
    few = embeddings(url, "all-minilm", dimensions=8)
    same("dimensions", {len(each) for each in few.embed_documents(TEXTS)}, {8})
    many = embeddings(url, "all-minilm", dimensions=1000)
    raises("too many dimensions", BadRequestError, many.embed_query, "x")
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings(url, "all-minilm"))
    (found,) = store.similarity_search("the stock market", k=1)
    same("a store finds what is near", found.page_content, TEXTS[2])


if __name__ == "__main__":
    main()
