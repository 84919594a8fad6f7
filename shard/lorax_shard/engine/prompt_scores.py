"""What a row reports of its prompt: how likely each token was, and which were likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from lorax_shard.sampling.reference import top_alternatives
from lorax_shard.sampling.sampled import LEAST_LOGPROB

# Legend: P prompt positions, V vocabulary.

# Ids and logprobs of the likeliest tokens at one position, best first.
Likeliest: TypeAlias = tuple[list[int], list[float]]

# Positions of a prompt whose log-softmax is held at once.
_CHUNK = 64


@dataclass(slots=True)
class PromptScores:
    """One entry per position, in order; the model's own logprobs, before any bias or penalty."""

    logprobs: list[float] = field(default_factory=list)
    # Empty if no alternatives were asked for.
    alternatives: list[Likeliest] = field(default_factory=list)

    def extend(self, more: PromptScores) -> None:
        """Append the positions that follow."""
        self.logprobs += more.logprobs
        self.alternatives += more.alternatives


def prompt_scores(
    logits: torch.Tensor,  # P x V
    target_ids: Sequence[int],
    num_alternatives: int = 0,
) -> PromptScores:
    """Return the logprob of target i under row i of ``logits``, and what else was likely there.

    Always finite: a target that is masked, or whose row holds no numbers, gets
    ``LEAST_LOGPROB``.
    """
    result = PromptScores()
    for start in range(0, len(target_ids), _CHUNK):
        part = logits[start : start + _CHUNK].float()
        targets = torch.as_tensor(target_ids[start : start + _CHUNK], device=part.device)
        logprobs = torch.log_softmax(part, dim=-1)
        finite = torch.nan_to_num(
            logprobs.gather(1, targets.unsqueeze(1)).squeeze(1),
            nan=LEAST_LOGPROB,
            posinf=LEAST_LOGPROB,
            neginf=LEAST_LOGPROB,
        )
        result.logprobs += finite.tolist()
        if num_alternatives:
            result.alternatives += [top_alternatives(row, num_alternatives) for row in logprobs]
    return result
