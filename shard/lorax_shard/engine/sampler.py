"""Chooses the next token of each row from its logits.

Order: repetition penalty (prompt and output), frequency and presence penalty
(output), then for rows that sample: temperature, top_k, top_p, typical_p, min_p
and a draw. Nothing here depends on which rows come together: every sum runs over
one row, in an order that the vocabulary alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_contract.step import SamplingParams
from lorax_shard.engine.distribution import Distribution, largest, warp
from lorax_shard.engine.draws import uniforms
from lorax_shard.engine.id_tree import num_levels

# Legend: S sampled rows, V vocabulary, P prompt positions.

# Stands for the logprob of what is impossible, as JSON has no infinity.
LEAST_LOGPROB = -(2.0**100)
# Temperatures below this would not be normal float32 numbers; the result is the same.
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
_NO_TOKEN = -1
# Positions of a prompt whose log-softmax is held at once.
_PROMPT_CHUNK = 64


class SamplerRow(Protocol):
    """What the sampler reads of a row."""

    @property
    def params(self) -> SamplingParams:
        """How to choose the token."""

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Prompt and output so far; their number is the position of the draw."""

    @property
    def num_prompt_tokens(self) -> int:
        """How many of ``token_ids`` are prompt."""


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
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)

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
            _sample_greedy(penalised(logits, rows, greedy), rows, greedy, result)
        if drawn:
            _sample_drawn(penalised(logits, rows, drawn), rows, drawn, result)
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


def penalised(logits: torch.Tensor, rows: Sequence[SamplerRow], indices: list[int]) -> torch.Tensor:
    """Return the logits of the chosen rows after penalties; a copy unless nothing changes."""
    has_penalty = [_has_penalty(rows[i].params) for i in indices]
    if len(indices) == logits.shape[0] and not any(has_penalty):
        return logits
    chosen = logits[torch.tensor(indices, device=logits.device)]
    for scores, index, needed in zip(chosen, indices, has_penalty, strict=True):
        if needed:
            _apply_penalties(scores, rows[index])
    return chosen


def prompt_logprobs(logits: torch.Tensor, target_ids: Sequence[int]) -> list[float]:
    """Return the logprob of target i under row i of ``logits`` (P x V).

    Always finite: a target that is masked, or whose row holds no numbers, gets
    ``LEAST_LOGPROB``.
    """
    result: list[float] = []
    for start in range(0, len(target_ids), _PROMPT_CHUNK):
        part = logits[start : start + _PROMPT_CHUNK].float()
        targets = torch.as_tensor(target_ids[start : start + _PROMPT_CHUNK], device=part.device)
        logprobs = torch.log_softmax(part, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        finite = torch.nan_to_num(
            logprobs, nan=LEAST_LOGPROB, posinf=LEAST_LOGPROB, neginf=LEAST_LOGPROB
        )
        result.extend(finite.tolist())
    return result


def top_alternatives(logprobs: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """Return the ``count`` likeliest tokens of a row of V logprobs, best first.

    Ties go to the lower id; tokens with probability 0 are left out.
    """
    values = logprobs.detach().cpu().numpy()
    best = largest(values, count)
    best = best[np.isfinite(values[best])]
    return best.tolist(), values[best].tolist()


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
    row = _KnownRow(params, token_ids, num_prompt_tokens)
    scores = penalised(logits.reshape(1, -1).float(), [row], [0])
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


def _sample_greedy(
    scores: torch.Tensor,  # one row per index, penalised
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
        count = rows[index].params.num_alternatives
        if count > 0:
            result.alternatives[index] = top_alternatives(all_logprobs[i], count)


def _sample_drawn(
    scores: torch.Tensor,  # one row per index, penalised
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
        count = rows[index].params.num_alternatives
        if count > 0:
            result.alternatives[index] = distribution.likeliest(count)


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
