"""Draws many rows at once by tensor operations, on any device: the specification without a loop.

What is drawn is read from the device once, when somebody asks for it: who computes the next
step takes the ids where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lorax_shard.sampling.device_tokens import DeviceTokens
from lorax_shard.sampling.distribution import ENTROPY_ONE
from lorax_shard.sampling.draws import uniforms
from lorax_shard.sampling.id_tree import BLOCK, BLOCK_LEVELS, ONE, num_levels
from lorax_shard.sampling.masks import NO_MASKS, Masks, forbid
from lorax_shard.sampling.reference import softmax_of, temperatures_of
from lorax_shard.sampling.sampled import (
    ALL_MASKED,
    NO_NUMBERS,
    NO_TOKEN,
    SampledTokens,
    is_greedy,
    is_raw,
    most_alternatives,
    nothing_sampled,
)
from lorax_shard.sampling.scores import SamplerRow, adjusted
from lorax_shard.sampling.watermark import Watermark
from lorax_shard.transfer import to_device

# Stands for the id of a row whose tokens are all masked.
_MASKED = -2

# Legend: S sampled rows, D drawn ones of them, V vocabulary, A alternatives.


def draw_batch(
    logits: torch.Tensor,
    rows: Sequence[SamplerRow],
    watermark: Watermark,
    masks: Masks = NO_MASKS,
) -> DeviceTokens:
    """Return the next token of each row of ``logits`` (S x V); none for rows without numbers.

    Nothing here waits for the device.
    """
    found = _found(forbid(logits, masks), rows, watermark)
    num_alternatives = [row.params.num_alternatives for row in rows]
    ids = found[:, 0].long().clamp_(min=NO_TOKEN)
    return DeviceTokens(ids, found, lambda host: _tokens(host, num_alternatives))


def _found(
    logits: torch.Tensor, rows: Sequence[SamplerRow], watermark: Watermark
) -> torch.Tensor:  # S x (2 + 2A) float64
    """Return of each row its id, its logprob, the ids of its alternatives and their logprobs."""
    num_best = most_alternatives(rows)
    greedy = [i for i, row in enumerate(rows) if is_greedy(row.params)]
    drawn = [i for i, row in enumerate(rows) if not is_greedy(row.params)]
    found = torch.empty(len(rows), 2 + 2 * num_best, dtype=torch.float64, device=logits.device)
    if greedy:
        scores = adjusted(logits, rows, greedy, watermark)
        ids = scores.argmax(dim=-1)  # the first of equal ones
        _write(found, greedy, torch.log_softmax(scores, dim=-1), ids, num_best)
        _tell_masked(found, greedy, scores)
    if drawn:
        scores = adjusted(logits, rows, drawn, watermark)
        chosen = [rows[index] for index in drawn]
        _draw(found, drawn, scores, chosen, num_best)
        _tell_masked(found, drawn, scores)
    raw = [i for i, row in enumerate(rows) if is_raw(row)]
    if raw:
        at = _tensor(raw, logits)
        before = found[at, 0]
        ids, has_token = before.long().clamp_(min=0), before >= 0
        _write(found, raw, torch.log_softmax(logits[at], dim=-1), ids, num_best)
        found[at, 0] = torch.where(has_token, found[at, 0], before)
    return found


def _tell_masked(found: torch.Tensor, indices: list[int], scores: torch.Tensor) -> None:
    """Tell rows whose tokens are all masked from those without numbers."""
    at = _tensor(indices, found)
    is_masked = torch.isneginf(scores.amax(dim=-1))
    found[at, 0] = torch.where(is_masked, float(_MASKED), found[at, 0])


def _write(
    found: torch.Tensor,
    indices: list[int],
    logprobs: torch.Tensor,  # a row of V for each index
    ids: torch.Tensor,
    num_best: int,
) -> None:
    """Write what is read from all logprobs of rows; no token where these are no numbers."""
    own = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
    parts = [torch.where(torch.isfinite(own), ids, -1).unsqueeze(1), own.unsqueeze(1)]
    if num_best:
        num = min(num_best, logprobs.shape[1])
        # Stable: ties go to the lower id.
        values, best = logprobs.sort(dim=-1, descending=True, stable=True)
        parts += [_widened(best[:, :num], num_best), _widened(values[:, :num], num_best)]
    found[_tensor(indices, found)] = torch.cat([part.double() for part in parts], dim=1)


def _widened(columns: torch.Tensor, width: int) -> torch.Tensor:
    """Return A columns; what is not there has the logprob minus infinity."""
    missing = (0, width - columns.shape[1])
    return torch.nn.functional.pad(columns.double(), missing, value=-torch.inf)


def _draw(
    found: torch.Tensor,
    indices: list[int],
    scores: torch.Tensor,  # D x V
    rows: Sequence[SamplerRow],
    num_best: int,
) -> None:
    probs = softmax_of(scores, temperatures_of(rows, scores.device))
    is_number = ~torch.isnan(probs[:, :1])
    # Whatever comes of a row without numbers: it gives no token.
    probs = torch.where(is_number, probs, 1.0 / probs.shape[1])
    kept = _warped(probs, rows)
    weights = _to_fixed(kept)
    ids, total = _descend_tree(weights, _numbers(rows, scores))
    log_total = (total.double() / ONE).log().unsqueeze(1)
    own = probs.gather(1, ids.unsqueeze(1)).double().log() - log_total
    parts = [torch.where(is_number, ids.unsqueeze(1), -1), own]
    if num_best:
        num = min(num_best, probs.shape[1])
        values, best = kept.sort(dim=-1, descending=True, stable=True)
        logprobs = values[:, :num].double().log() - log_total
        parts += [_widened(best[:, :num], num_best), _widened(logprobs, num_best)]
    found[_tensor(indices, found)] = torch.cat([part.double() for part in parts], dim=1)


def _numbers(rows: Sequence[SamplerRow], like: torch.Tensor) -> torch.Tensor:  # D x levels
    """Return the numbers of each row's draw: they depend on nothing that a device computed."""
    seeds, positions = [row.params.seed for row in rows], [row.num_tokens for row in rows]
    values = uniforms(seeds, positions, num_levels(like.shape[1]))
    return to_device(torch.from_numpy(np.ascontiguousarray(values)), like.device)


def _to_fixed(probs: torch.Tensor) -> torch.Tensor:
    return (probs * ONE).long()


def _warped(probs: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:  # D x V
    """Return the probabilities with 0 for what top_k, top_p, typical_p and min_p leave out."""
    vocab_size = probs.shape[1]
    params = [row.params for row in rows]
    has_top = [0 < each.top_k < vocab_size or each.top_p < 1.0 for each in params]
    typical = [each.typical_p if 0.0 < each.typical_p < 1.0 else 1.0 for each in params]
    if any(has_top):
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        top_k = [each.top_k if 0 < each.top_k < vocab_size else vocab_size for each in params]
        top_p = [min(each.top_p, 1.0) for each in params]
        ordered = _keep_top(ordered, _column(top_k, probs), _column(top_p, probs))
        probs = torch.zeros_like(probs).scatter_(1, ids, ordered)
    if any(each < 1.0 for each in typical):
        probs = _keep_typical(probs, _column(typical, probs))
    if any(each.min_p > 0.0 for each in params):
        shares = _column([min(1.0, max(0.0, each.min_p)) for each in params], probs)
        least = shares * probs.amax(dim=-1, keepdim=True).double()
        probs = torch.where(probs.double() >= least, probs, 0.0)
    return probs


def _keep_top(ordered: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Apply top_k and top_p to probabilities, the largest first."""
    least = ordered.gather(1, top_k.long() - 1)
    ordered = torch.where(ordered >= least, ordered, 0.0)
    weights = _to_fixed(ordered)
    ends = weights.cumsum(dim=-1)
    is_kept = (ends - weights < _wanted(ends, top_p)) | (top_p >= 1.0)
    return torch.where(is_kept, ordered, 0.0)


def _wanted(ends: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the mass that rows keep at least, by what they have up to each token."""
    total = ends[:, -1:]
    wanted = (shares * total.double()).ceil().long().clamp_(min=1)
    return torch.minimum(wanted, total)


def _keep_typical(probs: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    weights = _to_fixed(probs)
    total = weights.sum(dim=-1, keepdim=True).double() / ONE
    shares = torch.where(weights > 0, probs.double() / total, 0.0)
    logs = shares.log()
    terms = (torch.xlogy(shares, shares) * ENTROPY_ONE).long()
    entropy = -terms.sum(dim=-1, keepdim=True).double() / ENTROPY_ONE
    distances, order = (logs + entropy).abs().sort(dim=-1, stable=True)
    ends = weights.gather(1, order).cumsum(dim=-1)
    last = (ends < _wanted(ends, typical_p)).sum(dim=-1, keepdim=True)
    is_kept = (distances <= distances.gather(1, last)) & torch.isfinite(distances)
    is_kept |= typical_p >= 1.0
    return torch.where(torch.zeros_like(is_kept).scatter_(1, order, is_kept), probs, 0.0)


def _descend_tree(
    weights: torch.Tensor,  # D x V
    numbers: torch.Tensor,  # D x levels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token that each row's numbers lead to, and the sum of its weights."""
    num_rows, vocab_size = weights.shape
    num_blocks = -(-vocab_size // BLOCK)
    blocks = torch.nn.functional.pad(weights, (0, num_blocks * BLOCK - vocab_size))
    blocks = blocks.view(num_rows, num_blocks, BLOCK)
    ends = blocks.sum(dim=-1).cumsum(dim=-1)
    block = _descend(ends, numbers[:, BLOCK_LEVELS:])
    within = blocks.gather(1, block.view(-1, 1, 1).expand(-1, 1, BLOCK)).squeeze(1).cumsum(dim=-1)
    return block * BLOCK + _descend(within, numbers), ends[:, -1]


def _descend(ends: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the leaf of each row; ``ends`` are cumulated weights of leaves."""
    num_leaves = ends.shape[1]
    leaf = torch.zeros(len(ends), dtype=torch.int64, device=ends.device)
    start, stop = torch.zeros_like(leaf), ends[:, -1]
    for level in range((num_leaves - 1).bit_length() - 1, -1, -1):
        middle = leaf + (1 << level)
        # Beyond the last leaf there is nothing more.
        split = ends.gather(1, (middle - 1).clamp_(max=num_leaves - 1).unsqueeze(1)).squeeze(1)
        left, right = split - start, stop - split
        mark = numbers[:, level] * (left + right).double()
        goes_right = (right > 0) & ((left <= 0) | (mark >= left.double()))
        leaf = torch.where(goes_right, middle, leaf)
        start = torch.where(goes_right, split, start)
        stop = torch.where(goes_right, stop, split)
    return leaf


def _tokens(found: torch.Tensor, num_alternatives: list[int]) -> SampledTokens:
    """Return what the numbers say, which are on the host."""
    num_best = (found.shape[1] - 2) // 2
    lines = found.tolist()
    result = nothing_sampled(len(lines))
    for index, (values, count) in enumerate(zip(lines, num_alternatives, strict=True)):
        if values[0] < 0:
            result.fail(index, ALL_MASKED if values[0] == _MASKED else NO_NUMBERS)
            continue
        result.ids[index], result.logprobs[index] = int(values[0]), values[1]
        if count:
            best, logprobs = values[2 : 2 + count], values[2 + num_best : 2 + num_best + count]
            num = sum(each > -np.inf for each in logprobs)
            result.alternatives[index] = [int(each) for each in best[:num]], logprobs[:num]
    return result


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:  # D x 1 float64
    return to_device(torch.tensor(values, dtype=torch.float64), like.device).unsqueeze(1)


def _tensor(indices: list[int], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(indices), like.device)
