"""From a model's logits to the scores that tokens are drawn by, before any warper.

Order: what a request adds (its bias; minus infinity for tokens that may not come yet), its
watermark, repetition penalty (prompt and output), frequency and presence penalty (output).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_contract.step import LogitBias, SamplingParams
from lorax_shard.sampling.watermark import Watermark
from lorax_shard.transfer import to_device

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

    @property
    def num_tokens(self) -> int:
        """How many ``token_ids`` there are."""


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
    return row.edits is not None or row.params.watermark or has_penalty(row.params)


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
    all_scores = logits[_to_device(np.array(indices), logits)]
    _apply_edits(all_scores, chosen)
    _apply_watermark(all_scores, chosen, watermark)
    _apply_repetition_penalty(all_scores, chosen)
    _apply_count_penalties(all_scores, chosen)
    return all_scores


def has_penalty(params: SamplingParams) -> bool:
    """Return whether scores depend on the tokens so far."""
    return params.repetition_penalty != 1.0 or _counts(params)


def _counts(params: SamplingParams) -> bool:
    return params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _apply_edits(all_scores: torch.Tensor, rows: Sequence[SamplerRow]) -> None:
    lines = {at: edits for at, row in enumerate(rows) if (edits := row.edits) is not None}
    if lines:
        index = _places({at: edits.ids for at, edits in lines.items()}, all_scores)
        values = np.concatenate([edits.values for edits in lines.values()])
        # No place occurs twice.
        all_scores[index] += _to_device(values, all_scores)


def _apply_watermark(
    all_scores: torch.Tensor, rows: Sequence[SamplerRow], watermark: Watermark
) -> None:
    vocab_size = all_scores.shape[1]
    preferred = {
        at: watermark.preferred(int(row.token_ids[-1]), vocab_size)
        for at, row in enumerate(rows)
        if row.params.watermark
    }
    if preferred:
        mask = _to_device(np.stack(list(preferred.values())), all_scores)
        at = _to_device(np.array(list(preferred)), all_scores)
        all_scores[at] = all_scores[at].add_(mask, alpha=watermark.delta)


def _apply_repetition_penalty(all_scores: torch.Tensor, rows: Sequence[SamplerRow]) -> None:
    lines = {
        at: _known(row.token_ids, all_scores.shape[1])
        for at, row in enumerate(rows)
        if row.params.repetition_penalty != 1.0
    }
    if lines:
        index = _places(lines, all_scores)
        penalties = _column([row.params.repetition_penalty for row in rows], all_scores)
        penalty = penalties.squeeze(1).float()[index[0]]
        seen = all_scores[index]
        # An id that occurs several times writes the same value each time.
        all_scores[index] = torch.where(seen < 0, seen * penalty, seen / penalty)


def _apply_count_penalties(all_scores: torch.Tensor, rows: Sequence[SamplerRow]) -> None:
    counted = [at for at, row in enumerate(rows) if _counts(row.params)]
    if not counted:
        return
    vocab_size = all_scores.shape[1]
    outputs = {
        line: _known(rows[at].token_ids[rows[at].num_prompt_tokens :], vocab_size)
        for line, at in enumerate(counted)
    }
    counts = torch.zeros((len(counted), vocab_size), dtype=torch.int32, device=all_scores.device)
    index = _places(outputs, all_scores)
    counts.index_put_(index, torch.ones_like(index[0], dtype=torch.int32), accumulate=True)
    params = [rows[at].params for at in counted]
    amounts = counts * _column([each.frequency_penalty for each in params], all_scores)
    amounts += _column([each.presence_penalty for each in params], all_scores)
    at = _to_device(np.array(counted), all_scores)
    all_scores[at] -= torch.where(counts > 0, amounts, 0.0).float()


def _places(
    lines: Mapping[int, NDArray[np.int64]], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns of the ids in each line."""
    at = np.repeat(np.fromiter(lines, np.int64, len(lines)), [len(ids) for ids in lines.values()])
    return _to_device(at, like), _to_device(np.concatenate(list(lines.values())), like)


def _known(token_ids: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    """Return the ids that the head can produce; an input may have more."""
    return token_ids[(token_ids >= 0) & (token_ids < vocab_size)]


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:  # S x 1 float64
    return _to_device(np.array(values, dtype=np.float64), like).unsqueeze(1)


def _to_device(values: NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.from_numpy(values), like.device)
