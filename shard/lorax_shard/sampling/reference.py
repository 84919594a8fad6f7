"""Draws row by row in numpy: the specification, and what draws where no kernel can be had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_contract.step import SamplingParams
from lorax_shard.sampling.distribution import Distribution, largest, warp
from lorax_shard.sampling.draws import uniforms
from lorax_shard.sampling.id_tree import num_levels
from lorax_shard.sampling.masks import NO_MASKS, Masks, forbid
from lorax_shard.sampling.sampled import SampledTokens, is_greedy, is_raw, nothing_sampled
from lorax_shard.sampling.scores import LogitEdits, SamplerRow, adjusted, edits_of
from lorax_shard.sampling.watermark import Watermark
from lorax_shard.transfer import to_device

# Legend: S sampled rows, V vocabulary.

# Temperatures below this would not be normal float32 numbers; the result is the same.
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)


def sample_each(
    logits: torch.Tensor,
    rows: Sequence[SamplerRow],
    watermark: Watermark,
    masks: Masks = NO_MASKS,
) -> SampledTokens:
    """Return the next token of each row of ``logits`` (S x V); none for rows without numbers."""
    logits = forbid(logits, masks)
    result = nothing_sampled(len(rows))
    greedy = [i for i, row in enumerate(rows) if is_greedy(row.params)]
    drawn = [i for i, row in enumerate(rows) if not is_greedy(row.params)]
    if greedy:
        _sample_greedy(adjusted(logits, rows, greedy, watermark), rows, greedy, result)
    if drawn:
        _sample_drawn(adjusted(logits, rows, drawn, watermark), rows, drawn, result)
    _report_raw(logits, rows, result)
    return result


def top_alternatives(logprobs: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """Return the ``count`` likeliest tokens of a row of V logprobs, best first.

    Ties go to the lower id; tokens with probability 0 are left out. A row without numbers has none.
    """
    values = logprobs.detach().cpu().numpy()
    if np.isnan(values).any():
        return [], []
    best = largest(values, count)
    best = best[np.isfinite(values[best])]
    return best.tolist(), values[best].tolist()


def _sample_greedy(
    scores: torch.Tensor,  # one row per index
    rows: Sequence[SamplerRow],
    indices: list[int],
    result: SampledTokens,
) -> None:
    ids = scores.argmax(dim=-1)  # the first of equal ones
    all_logprobs = torch.log_softmax(scores, dim=-1)
    id_list = ids.tolist()
    logprobs = all_logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    for i, index in enumerate(indices):
        if not math.isfinite(logprobs[i]):
            continue
        result.ids[index] = id_list[i]
        result.logprobs[index] = logprobs[i]
        if count := _num_alternatives(rows[index]):
            result.alternatives[index] = top_alternatives(all_logprobs[i], count)


def _sample_drawn(
    scores: torch.Tensor,  # one row per index
    rows: Sequence[SamplerRow],
    indices: list[int],
    result: SampledTokens,
) -> None:
    chosen = [rows[index] for index in indices]
    seeds, positions = [r.params.seed for r in chosen], [len(r.token_ids) for r in chosen]
    numbers = uniforms(seeds, positions, num_levels(scores.shape[1])).tolist()
    for i, (index, distribution) in enumerate(
        zip(indices, distributions(scores, chosen), strict=True)
    ):
        if distribution is None:
            continue
        token_id = distribution.draw(numbers[i])
        result.ids[index] = token_id
        result.logprobs[index] = distribution.logprob(token_id)
        if count := _num_alternatives(rows[index]):
            result.alternatives[index] = distribution.likeliest(count)


def _num_alternatives(row: SamplerRow) -> int:
    """Return how many alternatives are read from what the row is drawn from."""
    return 0 if is_raw(row) else row.params.num_alternatives


def _report_raw(logits: torch.Tensor, rows: Sequence[SamplerRow], result: SampledTokens) -> None:
    """Replace the logprobs of rows that want the model's own."""
    indices = [i for i, row in enumerate(rows) if is_raw(row) and result.ids[i] >= 0]
    if not indices:
        return
    all_logprobs = torch.log_softmax(logits[torch.tensor(indices, device=logits.device)], dim=-1)
    ids = torch.tensor([result.ids[index] for index in indices], device=logits.device)
    logprobs = all_logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    for i, index in enumerate(indices):
        result.logprobs[index] = logprobs[i]
        if count := rows[index].params.num_alternatives:
            result.alternatives[index] = top_alternatives(all_logprobs[i], count)


def softmax_of(scores: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Return the softmax of S x V scores at S x 1 temperatures, in float32."""
    # The maximum goes first: a tiny temperature cannot overflow then.
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    shifted.div_(temperatures)
    vocab_size = shifted.shape[1]
    missing = softmax_width(vocab_size, shifted.device) - vocab_size
    if missing:
        shifted = torch.nn.functional.pad(shifted, (0, missing), value=-torch.inf)
    return torch.softmax(shifted, dim=-1)[:, :vocab_size]


def softmax_width(vocab_size: int, device: torch.device) -> int:
    """Return how many values a softmax is taken of: what has no chance fills the rest.

    A GPU sums a row up in an order that follows from where it begins, as far as it is not a
    multiple of 16 bytes: a row would have another softmax in another place of the batch.
    """
    return vocab_size if device.type == "cpu" else -(-vocab_size // 4) * 4


def temperatures_of(rows: Sequence[SamplerRow], device: torch.device) -> torch.Tensor:  # S x 1
    """Return the temperatures of rows that are drawn."""
    values = [[max(row.params.temperature, _LEAST_TEMPERATURE)] for row in rows]
    return to_device(torch.tensor(values, dtype=torch.float32), device)


def distributions(scores: torch.Tensor, rows: Sequence[SamplerRow]) -> list[Distribution | None]:
    """Return what each row draws from: its softmax, warped; None when it has none."""
    probs = softmax_of(scores, temperatures_of(rows, scores.device)).cpu().numpy()
    # One NaN, one +inf or nothing but -inf makes a row's whole softmax NaN.
    return [
        None if math.isnan(probs[i, 0]) else warp(probs[i], row.params)
        for i, row in enumerate(rows)
    ]


class DrawDistance(NamedTuple):
    """How a token relates to the random numbers of its draw."""

    # 0.0: the logits give that token. Small: a number fell next to the edge between two
    # halves, so a tiny difference in logits explains the token. Infinite: no chance.
    distance: float
    # The token's chance.
    probability: float


def draw_distance(
    logits: torch.Tensor,  # V
    params: SamplingParams,
    token_ids: NDArray[np.int64],
    chosen: int,
    num_prompt_tokens: int,
) -> DrawDistance:
    """Compare a token that was drawn after ``token_ids`` with what these logits give.

    Raises ValueError for params that do not sample.
    """
    if is_greedy(params):
        raise ValueError("draw_distance is for rows that sample; compare logits of greedy rows")
    row = _KnownRow(params, token_ids, num_prompt_tokens, edits_of(params.logit_bias))
    scores = adjusted(logits.reshape(1, -1).float(), [row], [0], Watermark())
    distribution = distributions(scores, [row])[0]
    if distribution is None:
        return DrawDistance(math.inf, 0.0)
    numbers = uniforms([params.seed], [len(token_ids)], num_levels(len(logits)))[0].tolist()
    distance = distribution.distance(chosen, numbers)
    return DrawDistance(distance, distribution.probability(chosen))


class _KnownRow(NamedTuple):
    params: SamplingParams
    token_ids: NDArray[np.int64]
    num_prompt_tokens: int
    edits: LogitEdits | None

    @property
    def num_tokens(self) -> int:
        """How many they are."""
        return len(self.token_ids)
