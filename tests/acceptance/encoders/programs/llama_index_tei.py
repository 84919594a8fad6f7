"""LlamaIndex's client of TEI, unmodified: ``python llama_index_tei.py URL MOOD_URL NAMES_URL``."""

from __future__ import annotations

import asyncio
import sys

from checks import check, same
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from plain_posts import TEXTS, near, vectors


def main() -> None:
    """Check all."""
    url = sys.argv[1]
    client = TextEmbeddingsInference(model_name="all-minilm", base_url=url, embed_batch_size=2)
    expected = vectors(url, TEXTS)
    check("several texts", near(client.get_text_embedding_batch(TEXTS), expected))
    check("a text", near([client.get_text_embedding(TEXTS[0])], expected[:1]))
    check("a query", near([client.get_query_embedding(TEXTS[0])], expected[:1]))
    later = asyncio.run(client.aget_text_embedding_batch(TEXTS))
    check("async", near(later, expected))
    same("a long text is cut", len(client.get_text_embedding("word " * 600)), 384)
    instructed = TextEmbeddingsInference(
        model_name="all-minilm", base_url=url, query_instruction="query:", text_instruction="text:"
    )
    found = instructed.get_query_embedding("cats")
    check("instructions", near([found], vectors(url, ["query: cats"])))


if __name__ == "__main__":
    main()
