"""Teacher forcing against transformers alone: are the served tokens the reference's choice?

The number of rows in a batch changes the rounding of matrix products, so two correct
servers may differ where two tokens are nearly as likely. The rule: at each position
the served token must be the reference's choice given the served tokens before it, or
the reference's gap between the two must be at most 4x the largest difference measured
in the same run between served and reference values. At most 1 token in 10,000 may
need that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOLERANCE = 4.0
MAX_NEAR_TIE_SHARE = 1e-4


@dataclass(slots=True)
class Served:
    """One answered request."""

    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Verdict:
    """How a run compared."""

    num_tokens: int = 0
    # Gaps of tokens that are not the reference's choice.
    gaps: list[float] = field(default_factory=list)
    max_difference: float = 0.0

    @property
    def num_wrong(self) -> int:
        """Tokens that no rounding explains."""
        return sum(gap > TOLERANCE * self.max_difference for gap in self.gaps)

    @property
    def num_near_ties(self) -> int:
        """Tokens that rounding explains."""
        return len(self.gaps) - self.num_wrong

    @property
    def ok(self) -> bool:
        """Whether the run passes the rule."""
        allowed = max(1, math.ceil(self.num_tokens * MAX_NEAR_TIE_SHARE))
        return self.num_tokens > 0 and self.num_wrong == 0 and self.num_near_ties <= allowed

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} tokens, {self.num_near_ties} near ties, {self.num_wrong} wrong, "
            f"largest difference {self.max_difference:.1e}, largest gap {max(self.gaps, default=0):.1e}"
        )


class Reference:
    """The stock model, one request at a time, float32."""

    def __init__(self, model_dir: Path, attention: str = "sdpa") -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation=attention
        ).eval()

    def logits(self, served: Served) -> torch.Tensor:
        """Return the logits that chose each output token: outputs x vocabulary."""
        ids = torch.tensor([served.prompt_ids + served.output_ids[:-1]])
        num = len(served.output_ids)
        with torch.inference_mode():
            return self._model(ids, logits_to_keep=num, use_cache=False).logits[0].float()

    def check_greedy(self, answers: list[Served]) -> Verdict:
        """Compare greedy answers."""
        verdict = Verdict()
        for served in answers:
            logits = self.logits(served)
            chosen = torch.tensor(served.output_ids)[:, None]
            own = logits.gather(1, chosen)[:, 0]
            gap = logits.max(dim=1).values - own
            reference = own - logits.logsumexp(dim=1)
            difference = (reference - torch.tensor(served.logprobs)).abs().max()
            verdict.max_difference = max(verdict.max_difference, float(difference))
            verdict.num_tokens += len(served.output_ids)
            verdict.gaps += [float(each) for each in gap if each > 0]
        return verdict

    def check_draws(self, answers: list[Served]) -> Verdict:
        """Compare seeded draws: gaps are distances of the drawn numbers to the edge.

        Served and reference values differ in the chosen token's probability, and so in
        the edges that the draw is compared with.
        """
        from lorax_contract.step import SamplingParams
        from lorax_shard.sampling.reference import draw_distance

        verdict = Verdict()
        judged: set[tuple[int, ...]] = set()
        for served in answers:
            params = SamplingParams(do_sample=True, **served.parameters)
            logits = self.logits(served)
            known = np.array(served.prompt_ids + served.output_ids, dtype=np.int64)
            num_prompt = len(served.prompt_ids)
            for position, token in enumerate(served.output_ids):
                # The same draw in another run of the same request is the same evidence.
                draw = (params.seed, *served.output_ids[: position + 1])
                if draw in judged:
                    continue
                judged.add(draw)
                verdict.num_tokens += 1
                before = known[: num_prompt + position]
                found = draw_distance(logits[position], params, before, token, num_prompt)
                served_p = math.exp(served.logprobs[position])
                difference = abs(found.probability - served_p)
                verdict.max_difference = max(verdict.max_difference, difference)
                if found.distance > 0:
                    verdict.gaps.append(found.distance)
        return verdict
