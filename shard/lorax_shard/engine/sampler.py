"""Chooses the next token of each row from its logits.

Order: what ``scores`` adjusts (biases, penalties), then for rows that sample:
temperature, top_k, top_p, typical_p, min_p and a draw. Nothing here depends on which
rows come together: every sum runs over one row, in an order that the vocabulary alone
decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_contract.step import SamplingParams
from lorax_shard.engine.distribution import Distribution, largest, warp
from lorax_shard.engine.draws import uniforms
from lorax_shard.engine.id_tree import num_levels
from lorax_shard.engine.scores import LogitEdits, SamplerRow, adjusted, edits_of, is_adjusted
from lorax_shard.engine.watermark import Watermark

# Legend: S sampled rows, V vocabulary.

# Stands for the logprob of what is impossible, as JSON has no infinity.
LEAST_LOGPROB = -(2.0**100)
# Temperatures below this would not be normal float32 numbers; the result is the same.
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
_NO_TOKEN = -1


@dataclass(slots=True)
class SampledTokens:
    """One entry per row; a row in ``errors`` has id -1 and is to be ended."""

    ids: list[int]
    logprobs: list[float]
    # The likeliest tokens, best first; None for rows that asked for none.
    alternatives: list[tuple[list[int], list[float]] | None]
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Chooses tokens for the rows of a step; holds no state of any row.

    Args:
        vocab_size: columns beyond it (a padded head) are never chosen.
        device: where the logits come from.
        watermark: what rows prefer that ask for a watermark.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str = "cpu",
        watermark: Watermark | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._watermark = watermark if watermark is not None else Watermark()

    def with_vocab(self, vocab_size: int) -> Sampler:
        """Return a sampler for rows of another vocabulary, otherwise like this one."""
        return Sampler(vocab_size, self.device, self._watermark)

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> SampledTokens:
        """Return the next token of each row; ``logits`` is S x V float32 and stays as it is.

        Raises ValueError when the shape does not fit the rows or the vocabulary.
        """
        self._check_shape(logits, len(rows))
        logits = logits[:, : self.vocab_size]
        result = SampledTokens(
            [_NO_TOKEN] * len(rows), [LEAST_LOGPROB] * len(rows), [None] * len(rows)
        )
        greedy = [i for i, row in enumerate(rows) if is_greedy(row.params)]
        drawn = [i for i, row in enumerate(rows) if not is_greedy(row.params)]
        if greedy:
            _sample_greedy(adjusted(logits, rows, greedy, self._watermark), rows, greedy, result)
        if drawn:
            _sample_drawn(adjusted(logits, rows, drawn, self._watermark), rows, drawn, result)
        _report_raw(logits, rows, result)
        return result

    def _check_shape(self, logits: torch.Tensor, num_rows: int) -> None:
        if logits.dim() != 2 or logits.shape[0] != num_rows or logits.shape[1] < self.vocab_size:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)}; "
                f"expected {num_rows} rows of at least {self.vocab_size} values"
            )


def is_greedy(params: SamplingParams) -> bool:
    """Return whether the likeliest token is taken; temperature 0 means that too."""
    return not params.do_sample or params.temperature <= 0.0


def top_alternatives(logprobs: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """Return the ``count`` likeliest tokens of a row of V logprobs, best first.

    Ties go to the lower id; tokens with probability 0 are left out.
    """
    values = logprobs.detach().cpu().numpy()
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
            result.errors[index] = _explain(scores[i])
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
            result.errors[index] = _explain(scores[i])
            continue
        token_id = distribution.draw(numbers[i])
        result.ids[index] = token_id
        result.logprobs[index] = distribution.logprob(token_id)
        if count := _num_alternatives(rows[index]):
            result.alternatives[index] = distribution.likeliest(count)


def _num_alternatives(row: SamplerRow) -> int:
    """Return how many alternatives are read from what the row is drawn from."""
    return 0 if _is_raw(row) else row.params.num_alternatives


def _is_raw(row: SamplerRow) -> bool:
    """Return whether a row wants logprobs that are others than those it is drawn from."""
    return row.params.raw_logprobs and (is_adjusted(row) or not is_greedy(row.params))


def _report_raw(logits: torch.Tensor, rows: Sequence[SamplerRow], result: SampledTokens) -> None:
    """Replace the logprobs of rows that want the model's own."""
    indices = [i for i, row in enumerate(rows) if _is_raw(row) and i not in result.errors]
    if not indices:
        return
    wanted = (
        logits if len(indices) == len(rows) else logits[torch.tensor(indices, device=logits.device)]
    )
    all_logprobs = torch.log_softmax(wanted, dim=-1)
    ids = torch.tensor([result.ids[index] for index in indices], device=logits.device)
    logprobs = all_logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    for i, index in enumerate(indices):
        result.logprobs[index] = logprobs[i]
        if count := rows[index].params.num_alternatives:
            result.alternatives[index] = top_alternatives(all_logprobs[i], count)


def distributions(scores: torch.Tensor, rows: Sequence[SamplerRow]) -> list[Distribution | None]:
    """Return what each row draws from: its softmax, warped; None when it has none."""
    temperatures = torch.tensor(
        [[max(row.params.temperature, _LEAST_TEMPERATURE)] for row in rows],
        dtype=torch.float32,
        device=scores.device,
    )
    # The maximum goes first: a tiny temperature cannot overflow then.
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    probs = torch.softmax(shifted.div_(temperatures), dim=-1).cpu().numpy()
    # One NaN, one +inf or nothing but -inf makes a row's whole softmax NaN.
    return [
        None if math.isnan(probs[i, 0]) else warp(probs[i], row.params)
        for i, row in enumerate(rows)
    ]


def _explain(scores: torch.Tensor) -> str:
    """Return why a row of logits gives no token."""
    if bool(torch.isneginf(scores).all()):
        return "every token is masked, so none can be chosen; loosen the constraints of the request"
    return (
        "the model returned logits that are no finite numbers; "
        "check the adapter's weights, or use a wider dtype"
    )


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
