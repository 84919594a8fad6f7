"""Random mixes of sampling parameters on logits as a model gives them, the same in every run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests.helpers.sampling import FakeRow, make_row

from lorax_contract.step import LogitBias


def peaked_logits(num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    """Return logits, some rows flat, some peaked, some rounded so that many are equal."""
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((num_rows, vocab_size), dtype=np.float32)
    logits *= generator.choice([0.3, 1.5, 3.0, 5.0], (num_rows, 1)).astype(np.float32)
    is_coarse = generator.random(num_rows) < 0.3
    logits[is_coarse] = np.round(logits[is_coarse] * 8) / 8
    return torch.from_numpy(logits)


def random_rows(num_rows: int, vocab_size: int, seed: int) -> list[FakeRow]:
    """Return rows that sample with one parameter or many."""
    generator = np.random.default_rng([seed, 1])
    return [_random_row(generator, vocab_size) for _ in range(num_rows)]


def random_masks(num_rows: int, vocab_size: int, seed: int) -> dict[int, NDArray[np.int32]]:
    """Return masks for some rows, of which some are too short, some too long, and one allows nothing."""
    generator = np.random.default_rng([seed, 2])
    masks = {}
    for row in range(1, num_rows, 3):
        num_words = max(1, -(-vocab_size // 32) + row % 4 - 1)
        masks[row] = generator.integers(-(2**31), 2**31, num_words).astype(np.int32)
    masks[num_rows - 1] = np.zeros(1, dtype=np.int32)
    return masks


def _random_row(generator: np.random.Generator, vocab_size: int) -> FakeRow:
    def draw(low: float, high: float) -> float:
        return round(float(generator.uniform(low, high)), 3)

    choices: dict[str, Any] = {
        "temperature": draw(0.2, 2.0),
        "top_k": int(generator.integers(1, 60)),
        "top_p": draw(0.05, 0.999),
        "typical_p": draw(0.1, 0.99),
        "min_p": draw(0.001, 0.3),
        "repetition_penalty": draw(0.7, 1.6),
        "frequency_penalty": draw(-1.0, 1.0),
        "presence_penalty": draw(-1.0, 1.0),
        "logit_bias": _random_bias(generator, vocab_size),
        "watermark": True,
        "raw_logprobs": True,
        "num_alternatives": int(generator.integers(1, 6)),
    }
    share = generator.choice([0.1, 0.3, 0.8])
    params = {name: value for name, value in choices.items() if generator.random() < share}
    ids: NDArray[np.int64] = generator.integers(0, vocab_size, generator.integers(2, 40))
    num_prompt = int(generator.integers(1, len(ids)))
    banned = tuple(map(int, generator.integers(0, vocab_size, generator.integers(0, 3))))
    return make_row(
        ids[:num_prompt].tolist(), ids[num_prompt:].tolist(), banned=banned,
        do_sample=bool(generator.random() < 0.9), seed=int(generator.integers(0, 2**63)), **params,
    )  # fmt: skip


def _random_bias(generator: np.random.Generator, vocab_size: int) -> LogitBias:
    ids = np.unique(generator.integers(0, vocab_size, 5))
    values = np.round(generator.uniform(-4, 4, len(ids)), 2)
    return LogitBias(tuple(map(int, ids)), tuple(map(float, values)))
