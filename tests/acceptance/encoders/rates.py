"""Texts a second by a library, round by round: ``python rates.py``, in an environment of its own.

Reads lines ``{"library", "folder", "texts"}`` from its input and answers each with the seconds that
it took; the first line of a library loads it, and is not counted.
"""

import json
import sys
import time

import torch


def sentence_transformers(folder, backend):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", backend=backend)
    return lambda texts: model.encode(texts, batch_size=32)


def infinity(folder):
    import asyncio

    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    loop = asyncio.new_event_loop()
    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(model_name_or_path=folder, engine="torch", device="cpu", batch_size=32)
    )
    loop.run_until_complete(engine.astart())
    return lambda texts: loop.run_until_complete(engine.embed(sentences=texts))


MADE = {
    "sentence-transformers": lambda folder: sentence_transformers(folder, "torch"),
    "onnx": lambda folder: sentence_transformers(folder, "onnx"),
    "infinity-emb": infinity,
}


def main():
    torch.set_num_threads(2)
    libraries = {}
    for line in sys.stdin:
        asked = json.loads(line)
        name, answer = asked["library"], {}
        try:
            if name not in libraries:
                libraries[name] = MADE[name](asked["folder"])
                libraries[name](asked["texts"])
            begun = time.perf_counter()
            libraries[name](asked["texts"])
            answer["seconds"] = time.perf_counter() - begun
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"[:300]
        print("RATE " + json.dumps(answer), flush=True)


main()
