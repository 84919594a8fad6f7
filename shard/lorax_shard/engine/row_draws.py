"""Draws for the rows of one pass, each among the tokens of its own vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorax_shard.constraints.masks import masks_of
from lorax_shard.engine.forward import PassResult
from lorax_shard.engine.prompt_scores import PromptScores, prompt_scores
from lorax_shard.engine.rows import DraftedRow, IdArray, Row
from lorax_shard.sampling.masks import NO_MASKS, Masks
from lorax_shard.sampling.parts import DrawnPart, PartedDraws
from lorax_shard.sampling.sampled import Draws
from lorax_shard.sampling.sampler import Sampler
from lorax_shard.transfer import to_device


class PassDraws(NamedTuple):
    """What is drawn from the logits of one pass."""

    # One entry per position that is drawn; None: there is none.
    sampled: Draws | None
    # One entry per prompt span.
    prompts: list[PromptScores]


def draw(sampler: Sampler, result: PassResult) -> PassDraws:
    """Draw the next tokens of the rows that sample, and read what prompts ask for."""
    rows, logits = result.inputs.sampled, result.logits
    with torch.inference_mode():
        sampled = draw_bound(sampler, logits[: len(rows)], rows) if rows else None
        prompts, start = [], len(rows)
        for span in result.inputs.prompt_spans:
            end = start + len(span.targets)
            prompts.append(scores_of(sampler, logits[start:end], span.row, span.targets))
            start = end
    return PassDraws(sampled, prompts)


def draw_bound(sampler: Sampler, logits: torch.Tensor, rows: Sequence[Row | DraftedRow]) -> Draws:
    """Draw what the rows' constraints allow; a constraint that failed is the error of its row."""
    constraints = {
        index: row.constraint for index, row in enumerate(rows) if row.constraint is not None
    }
    masks, errors = masks_of(constraints)
    draws = draw_rows(sampler, logits, rows, masks)
    for index, reason in errors.items():
        draws.fail(index, reason)
    return draws


def draw_rows(
    sampler: Sampler,
    logits: torch.Tensor,
    rows: Sequence[Row | DraftedRow],
    masks: Masks = NO_MASKS,
) -> Draws:
    """Draw for rows of several vocabularies: each among its own tokens, as if it were alone."""
    vocab_sizes = [_vocab_size(sampler, row) for row in rows]
    distinct = set(vocab_sizes)
    if distinct == {sampler.vocab_size}:
        return sampler.draw(logits, rows, masks)
    parts = []
    for vocab_size in sorted(distinct):
        places = [index for index, size in enumerate(vocab_sizes) if size == vocab_size]
        at = to_device(torch.tensor(places), logits.device)
        own, chosen = sampler.with_vocab(vocab_size), [rows[index] for index in places]
        few = {place: masks[index] for place, index in enumerate(places) if index in masks}
        parts.append(DrawnPart(places, at, own.draw(logits[at], chosen, few)))
    return PartedDraws(parts)


def scores_of(sampler: Sampler, logits: torch.Tensor, row: Row, targets: IdArray) -> PromptScores:
    """Return what a row reports of prompt tokens, among its own vocabulary.

    A neighbour with more tokens makes all logits wider, and sums over wider rows round otherwise.
    """
    own = logits[:, : _vocab_size(sampler, row)]
    return prompt_scores(own, targets.tolist(), row.params.num_prompt_alternatives)


def _vocab_size(sampler: Sampler, row: Row | DraftedRow) -> int:
    return row.adapter.vocab_size if row.adapter else sampler.vocab_size
