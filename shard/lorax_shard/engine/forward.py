"""One forward pass over rows: inputs and logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lorax_shard.engine.inputs import PassInputs, RowWork, build_inputs
from lorax_shard.engine.rows import ResidentBatch
from lorax_shard.engine.vectors import scored
from lorax_shard.model.interface import PagedModel
from lorax_shard.model.launch import launched

# Prompt positions that one pass returns logits for. A row of logits is as long as the
# vocabulary: those of a whole prompt could take more memory than all else in a step.
MAX_PROMPT_LOGITS = 256


class PassResult(NamedTuple):
    """What one forward pass gives; nothing of its rows has changed yet."""

    inputs: PassInputs
    # Those of the rows that sample, then those of the prompt spans.
    logits: torch.Tensor  # S x V float32
    # Of each of the vector spans what the last layer gives, or what a head makes of it.
    hidden: list[torch.Tensor]  # each n x hidden, or n x labels


def run_pass(model: PagedModel, batch: ResidentBatch, work: list[RowWork]) -> PassResult:
    """Compute rows in one forward pass; rows of one token must come first."""
    inputs = build_inputs(batch, work)
    with torch.inference_mode():
        if inputs.vector_spans:
            logits, hidden = _with_states(model, inputs)
            return PassResult(inputs, logits, scored(model, inputs.vector_spans, hidden))
        captured = None if model.graphs is None else model.graphs.run(inputs.numbers)
        logits = launched(model, inputs.numbers) if captured is None else captured
    return PassResult(inputs, logits, [])


def _with_states(
    model: PagedModel, inputs: PassInputs
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Return the logits of a pass, and what the last layer gives for its vectors' tokens."""
    spans = [(start, stop) for _, start, stop in inputs.vector_spans]
    if model.graphs is not None:
        tokens = np.concatenate([np.arange(*span) for span in spans])
        captured = model.graphs.run_with_states(inputs.numbers, tokens)
        if captured is not None:
            logits, states = captured
            return logits, torch.split(states, [stop - start for start, stop in spans])
    with model.keeping_hidden() as kept:
        logits = launched(model, inputs.numbers)
    return logits, [kept.states[start:stop] for start, stop in spans]


def passes(work: list[RowWork], batch: ResidentBatch) -> Iterator[list[RowWork]]:
    """Split a step so that no pass asks for more than MAX_PROMPT_LOGITS; nearly always it is one.

    Rows of one token come first in each. A row that failed in a pass is in none after it.
    """
    while True in [item.row.scores_prompt for item in work]:
        room = MAX_PROMPT_LOGITS
        now: list[RowWork] = []
        later: list[RowWork] = []
        for row, num_tokens, draft in work:
            num_now = num_tokens
            if row.scores_prompt:
                num_now = min(num_tokens, room)
                room -= num_now
            if num_now:
                now.append(RowWork(row, num_now, draft))
            if num_now < num_tokens:
                later.append(RowWork(row, num_tokens - num_now))
        yield sorted(now, key=lambda item: item.num_computed > 1)
        work = [item for item in later if item.row.request_id in batch]
    if work:
        yield work
