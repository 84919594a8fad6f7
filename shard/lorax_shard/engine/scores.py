"""From a model's logits to the scores that tokens are drawn by, before any warper.

Order: what a request adds (its bias; minus infinity for tokens that may not come yet), its
watermark, repetition penalty (prompt and output), frequency and presence penalty (output).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_contract.step import LogitBias, SamplingParams
from lorax_shard.engine.watermark import Watermark

# Legend: S sampled rows, V vocabulary.


class LogitEdits(NamedTuple):
    """What is added to the logits of one row; each id once."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


class SamplerRow(Protocol):
    """What the sampler reads of a row."""

    @property
    def params(self) -> SamplingParams:
        """How to choose the token."""

    @property
    def edits(self) -> LogitEdits | None:
        """What is added to the logits of the next token; None: nothing."""

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Prompt and output so far; their number is the position of the draw."""

    @property
    def num_prompt_tokens(self) -> int:
        """How many of ``token_ids`` are prompt."""


def edits_of(bias: LogitBias, banned: Collection[int] = ()) -> LogitEdits | None:
    """Return a bias as arrays, with minus infinity for the banned ids whatever their bias."""
    added = dict(zip(bias.ids, bias.values, strict=True)) | dict.fromkeys(banned, -np.inf)
    if not added:
        return None
    return LogitEdits(
        np.fromiter(added.keys(), np.int64, len(added)),
        np.fromiter(added.values(), np.float32, len(added)),
    )


def is_adjusted(row: SamplerRow) -> bool:
    """Return whether the scores of a row are others than its logits."""
    return row.edits is not None or row.params.watermark or _has_penalty(row.params)


def adjusted(
    logits: torch.Tensor,  # S x V float32
    rows: Sequence[SamplerRow],
    indices: list[int],
    watermark: Watermark,
) -> torch.Tensor:
    """Return the scores of the chosen rows; a copy unless they are all logits as they are."""
    chosen = [rows[i] for i in indices]
    if len(indices) == logits.shape[0] and not any(is_adjusted(row) for row in chosen):
        return logits
    all_scores = logits[torch.tensor(indices, device=logits.device)]
    _apply_edits(all_scores, chosen)
    for scores, row in zip(all_scores, chosen, strict=True):
        if row.params.watermark:
            watermark.apply(scores, int(row.token_ids[-1]))
        if _has_penalty(row.params):
            _apply_penalties(scores, row)
    return all_scores


def _apply_edits(all_scores: torch.Tensor, rows: Sequence[SamplerRow]) -> None:
    """Add what the rows add, in one go."""
    lines = [(at, edits) for at, row in enumerate(rows) if (edits := row.edits) is not None]
    if not lines:
        return
    counts = [len(edits.ids) for _, edits in lines]
    at = np.repeat(np.array([at for at, _ in lines], dtype=np.int64), counts)
    ids = np.concatenate([edits.ids for _, edits in lines])
    values = np.concatenate([edits.values for _, edits in lines])
    index = (_to_device(at, all_scores), _to_device(ids, all_scores))
    # No place occurs twice.
    all_scores[index] += _to_device(values, all_scores)


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _apply_penalties(scores: torch.Tensor, row: SamplerRow) -> None:
    """Change one row of V scores in place, only where the row's tokens are."""
    params = row.params
    if params.repetition_penalty != 1.0:
        ids = _to_device(_known(row.token_ids, len(scores)), scores)
        seen = scores[ids]
        penalty = params.repetition_penalty
        # An id that occurs several times writes the same value each time.
        scores[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        output_ids = _known(row.token_ids[row.num_prompt_tokens :], len(scores))
        unique_ids, counts = np.unique(output_ids, return_counts=True)
        amounts = counts * params.frequency_penalty + params.presence_penalty
        ids = _to_device(unique_ids, scores)
        scores[ids] -= _to_device(amounts.astype(np.float32), scores)


def _known(token_ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """Return the ids that the head can produce; an input may have more."""
    return token_ids[(token_ids >= 0) & (token_ids < vocab_size)]


def _to_device(values: NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)
