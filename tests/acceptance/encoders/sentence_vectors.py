"""Vectors by sentence-transformers itself: ``python sentence_vectors.py request.json``.

Runs in an environment of its own, which has nothing of this project. The request names model
folders, texts and a file for the vectors: for each folder of all texts at once, and of each alone.
"""

import json
import sys
from pathlib import Path

import numpy as np
import sentence_transformers
import torch


def main() -> None:
    """Compute what the request asks for."""
    request = json.loads(Path(sys.argv[1]).read_text())
    # Threads that wait for each other take long on a busy machine.
    torch.set_num_threads(1)
    found = {}
    for name, folder in request["folders"].items():
        model = sentence_transformers.SentenceTransformer(folder, device="cpu")
        texts = request["texts"]
        found[f"{name} together"] = model.encode(texts, batch_size=len(texts))
        found[f"{name} alone"] = model.encode(texts, batch_size=1)
    np.savez(request["out"], **found)
    print(f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}")


main()
