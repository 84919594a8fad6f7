"""Rows for the sampler, options worth a test, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from lorax_contract.step import LogitBias, SamplingParams
from lorax_shard.sampling.scores import LogitEdits, edits_of

PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.7}
BIAS = LogitBias((5, 2, 11, 40), (3.5, -2.25, -100.0, 1.5))
SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 900},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"typical_p": 0.99999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "typical_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.4},
    {"presence_penalty": -0.7},
    {"top_k": 12, "top_p": 0.5, **PENALTIES},
    {"temperature": 2.5, "min_p": 0.01, **PENALTIES},
    {"logit_bias": BIAS},
    {"watermark": True},
    {"temperature": 0.8, "logit_bias": BIAS, "watermark": True, **PENALTIES},
]


@dataclass(frozen=True, slots=True)
class FakeRow:
    """A row as the sampler sees it."""

    params: SamplingParams
    token_ids: NDArray[np.int64]
    num_prompt_tokens: int
    banned: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.token_ids)

    @property
    def edits(self) -> LogitEdits | None:
        """What the request adds to its logits."""
        return edits_of(self.params.logit_bias, self.banned)


def make_row(
    prompt_ids: Sequence[int] = (1, 2, 3),
    output_ids: Sequence[int] = (),
    *,
    banned: tuple[int, ...] = (),
    **params: Any,
) -> FakeRow:
    """Return a row with these tokens; ``params`` are those of SamplingParams."""
    ids = np.array([*prompt_ids, *output_ids], dtype=np.int64)
    return FakeRow(SamplingParams(**params), ids, len(prompt_ids), banned)


def random_logits(
    num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0
) -> torch.Tensor:  # rows x vocab
    """Return seeded normal logits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def reference_scores(logits: torch.Tensor, row: FakeRow) -> torch.Tensor:
    """Return processors and warpers of transformers on one row, in float64."""
    params = row.params
    scores = logits.double().reshape(1, -1).clone()
    if params.logit_bias:
        pairs = zip(params.logit_bias.ids, params.logit_bias.values, strict=True)
        biases = {(token_id,): value for token_id, value in pairs}
        ids = torch.from_numpy(row.token_ids).reshape(1, -1)
        scores = SequenceBiasLogitsProcessor(biases)(ids, scores)
    scores[0, list(row.banned)] = -float("inf")
    if params.watermark:
        mark = WatermarkLogitsProcessor(scores.shape[1], "cpu", greenlist_ratio=0.5, bias=2.0)
        scores = mark(torch.from_numpy(row.token_ids).reshape(1, -1), scores)
    if params.repetition_penalty != 1.0:
        ids = torch.from_numpy(row.token_ids).reshape(1, -1)
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token_id in set(row.token_ids[row.num_prompt_tokens :].tolist()):
        count = row.token_ids[row.num_prompt_tokens :].tolist().count(token_id)
        scores[0, token_id] -= count * params.frequency_penalty + params.presence_penalty
    if not params.do_sample:
        return scores[0]
    warpers = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0]
