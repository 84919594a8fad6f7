"""One forward pass over rows: inputs, logits, drawn tokens, logprobs of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorax_shard.engine.inputs import RowWork, StepInputs, build_inputs
from lorax_shard.engine.rows import IdArray, ResidentBatch, Row
from lorax_shard.engine.sampler import SampledTokens, Sampler, prompt_logprobs
from lorax_shard.model.interface import PagedModel

if TYPE_CHECKING:
    from lorax_shard.engine.rank_sampler import RankSampler

# Prompt positions that one pass returns logits for. A row of logits is as long as the
# vocabulary: those of a whole prompt could take more memory than all else in a step.
MAX_PROMPT_LOGITS = 256


class PassResult(NamedTuple):
    """What one forward pass gives; nothing of its rows has changed yet."""

    inputs: StepInputs
    sampled: SampledTokens | None
    # One list per prompt span of the inputs.
    prompt_logprobs: list[list[float]]


def run_pass(
    model: PagedModel, rank_sampler: RankSampler, batch: ResidentBatch, work: list[RowWork]
) -> PassResult:
    """Compute rows in one forward pass; rows of one token must come first."""
    with torch.inference_mode():
        inputs = build_inputs(model, batch, work)
        logits = model.forward(
            inputs.input_ids, inputs.positions, inputs.metadata, inputs.logit_rows, inputs.slots
        )
        num_sampled = len(inputs.sampled)
        sampled = None
        if inputs.sampled:
            sampled = rank_sampler.choose(logits[:num_sampled], inputs.sampled)
        prompts, start = [], num_sampled
        for span in inputs.prompt_spans:
            end = start + len(span.targets)
            prompts.append(
                logprobs_of(rank_sampler.sampler, logits[start:end], span.row, span.targets)
            )
            start = end
    return PassResult(inputs, sampled, prompts)


def sample(sampler: Sampler, logits: torch.Tensor, rows: list[Row]) -> SampledTokens:
    """Draw for rows of several vocabularies: each among its own tokens, as if it were alone."""
    vocab_sizes = [_vocab_size(sampler, row) for row in rows]
    distinct = set(vocab_sizes)
    if distinct == {sampler.vocab_size}:
        return sampler.sample(logits, rows)
    whole = SampledTokens([-1] * len(rows), [0.0] * len(rows), [None] * len(rows))
    for vocab_size in sorted(distinct):
        at = [index for index, size in enumerate(vocab_sizes) if size == vocab_size]
        own = Sampler(vocab_size, sampler.device)
        part = own.sample(logits[at, :vocab_size], [rows[index] for index in at])
        for place, index in enumerate(at):
            whole.ids[index] = part.ids[place]
            whole.logprobs[index] = part.logprobs[place]
            whole.alternatives[index] = part.alternatives[place]
            if place in part.errors:
                whole.errors[index] = part.errors[place]
    return whole


def logprobs_of(sampler: Sampler, logits: torch.Tensor, row: Row, targets: IdArray) -> list[float]:
    """Return the logprobs of a row's prompt tokens among its own vocabulary.

    A neighbour with more tokens makes all logits wider, and sums over wider rows round otherwise.
    """
    return prompt_logprobs(logits[:, : _vocab_size(sampler, row)], targets.tolist())


def _vocab_size(sampler: Sampler, row: Row) -> int:
    return row.adapter.vocab_size if row.adapter else sampler.vocab_size


def passes(work: list[RowWork], batch: ResidentBatch) -> Iterator[list[RowWork]]:
    """Split a step so that no pass asks for more than MAX_PROMPT_LOGITS; nearly always it is one.

    Rows of one token come first in each. A row that failed in a pass is in none after it.
    """
    while any(item.row.prompt_logprobs is not None for item in work):
        room = MAX_PROMPT_LOGITS
        now: list[RowWork] = []
        later: list[RowWork] = []
        for row, num_tokens in work:
            num_now = num_tokens
            if row.prompt_logprobs is not None:
                num_now = min(num_tokens, room)
                room -= num_now
            if num_now:
                now.append(RowWork(row, num_now))
            if num_now < num_tokens:
                later.append(RowWork(row, num_tokens - num_now))
        yield sorted(now, key=lambda item: item.num_tokens > 1)
        work = [item for item in later if item.row.request_id in batch]
    if work:
        yield work
