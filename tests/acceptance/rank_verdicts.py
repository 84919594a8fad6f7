"""What ranks computed beside PEFT alone, and beside one process.

PEFT computes one request at a time with its adapter, on the tokens that were served: so each
token has a reference, also those after a near tie at which two runs parted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from tests.acceptance.rank_runs import (
    MAX_STEP_TOKENS,
    SEED,
    RankResult,
    World,
    requests,
    results_of,
)
from tests.acceptance.reference import Verdict
from tests.helpers.peft_folders import load_adapter, load_model, logits_of

from lorax_contract.step import BASE_ADAPTER, RequestSpec

RELATIVE_TOLERANCE = 1e-4


@dataclass(slots=True)
class RankVerdict:
    """How the groups of worlds compared; differences are shares of the largest logit."""

    tokens: Verdict = field(default_factory=Verdict)
    to_peft: float = 0.0
    to_one_process: float = 0.0
    # Answers of two and more ranks with the very tokens of one process.
    num_equal: int = 0
    num_compared: int = 0
    # Answers whose ranks hold different tokens: there may be none.
    num_apart: int = 0
    # Answers of adapters for which the base model has the same logits: they would prove nothing.
    num_base_like: int = 0
    # Of each group that served.
    preemptions: list[int] = field(default_factory=list)
    num_chunked: int = 0

    @property
    def ok(self) -> bool:
        """Whether everything that is promised holds; a NaN is no equality."""
        return (
            self.tokens.ok
            and self.to_peft <= RELATIVE_TOLERANCE
            and self.to_one_process <= RELATIVE_TOLERANCE
            and not self.num_apart
            and not self.num_base_like
            and min(self.preemptions) > 0
            and self.num_chunked > 0
        )

    def take(self, other: RankVerdict) -> None:
        """Add what another verdict holds."""
        self.tokens.num_tokens += other.tokens.num_tokens
        self.tokens.gaps += other.tokens.gaps
        self.tokens.max_difference = _larger(
            self.tokens.max_difference, other.tokens.max_difference
        )
        self.to_peft = _larger(self.to_peft, other.to_peft)
        self.to_one_process = _larger(self.to_one_process, other.to_one_process)
        for name in ("num_equal", "num_compared", "num_apart", "num_base_like", "num_chunked"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.preemptions += other.preemptions

    def __str__(self) -> str:
        return (
            f"{self.tokens.num_tokens} tokens, {self.tokens.num_near_ties} near ties, "
            f"{self.tokens.num_wrong} wrong; largest difference of logits to PEFT alone "
            f"{self.to_peft:.1e}, to one process {self.to_one_process:.1e} of the largest; "
            f"{self.num_equal} of {self.num_compared} answers with the very tokens of one "
            f"process; {self.num_apart} with ranks apart, {self.num_base_like} like the base; {self.num_chunked} prompts in chunks; "
            f"{min(self.preemptions)} to {max(self.preemptions)} preemptions in each group"
        )


class PeftAlone:
    """PEFT's model of each adapter of a world, and stock transformers' for base rows."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._models = {BASE_ADAPTER: load_model(world.model_dir)}
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits(self, spec: RequestSpec, output: Sequence[int]) -> torch.Tensor:
        """Return the logits from which each output token was drawn."""
        key = (spec.request_id, spec.adapter, *output)
        if key not in self._known:
            if spec.adapter not in self._models:
                folder = self._world.adapter_dir(spec.adapter)
                self._models[spec.adapter] = load_adapter(self._world.model_dir, folder)
            ids = [*spec.prompt_ids, *output[:-1]]
            found = logits_of(self._models[spec.adapter], ids)
            self._known[key] = found[len(spec.prompt_ids) - 1 :]
        return self._known[key]

    def is_like_base(self, spec: RequestSpec, output: Sequence[int]) -> bool:
        """Tell whether an adapter's logits are the base model's, up to rounding."""
        if spec.adapter == BASE_ADAPTER:
            return False
        own = self.logits(spec, output)
        base = self.logits(replace(spec, adapter=BASE_ADAPTER), output)
        return float((own - base).abs().max() / base.abs().max()) < 10 * RELATIVE_TOLERANCE


def judge(world: World) -> RankVerdict:
    """Return how the groups of a world compared."""
    verdict = RankVerdict()
    specs = {int(spec.request_id): spec for spec in requests(SEED)}
    peft = PeftAlone(world)
    alone: RankResult | None = None
    for size, ranks in results_of(world):
        alone = alone or ranks[0]
        verdict.preemptions.append(ranks[0].num_preemptions)
        verdict.num_chunked += sum(len(s.prompt_ids) > MAX_STEP_TOKENS for s in specs.values())
        for number, spec in specs.items():
            output = ranks[0].tokens[number]
            verdict.num_base_like += peft.is_like_base(spec, output)
            verdict.num_apart += any(rank.tokens[number] != output for rank in ranks)
            _add(
                verdict, peft.logits(spec, output), [rank.logits[number] for rank in ranks], output
            )
            if size > 1:
                _compare(verdict, number, ranks, alone)
    return verdict


def _add(
    verdict: RankVerdict, expected: torch.Tensor, found: list[torch.Tensor], output: list[int]
) -> None:
    """Judge one answer by PEFT's logits, which are output tokens x vocabulary."""
    scale = float(expected.abs().max())
    for logits in found:
        difference = float((logits - expected).abs().max())
        verdict.tokens.max_difference = _larger(verdict.tokens.max_difference, difference)
        verdict.to_peft = _larger(verdict.to_peft, difference / scale)
    chosen = expected.gather(1, torch.tensor(output)[:, None])[:, 0]
    gaps = expected.max(dim=1).values - chosen
    verdict.tokens.num_tokens += len(output)
    verdict.tokens.gaps += [float(gap) for gap in gaps if gap > 0]


def _compare(verdict: RankVerdict, number: int, ranks: list[RankResult], one: RankResult) -> None:
    """Compare the logits of all ranks with one process's, for as long as the tokens are its own."""
    output, expected = ranks[0].tokens[number], one.tokens[number]
    verdict.num_compared += 1
    verdict.num_equal += output == expected
    pairs = enumerate(zip(output, expected, strict=False))
    # Logits from which the first different token was drawn have the same past, too.
    end = next((at + 1 for at, (a, b) in pairs if a != b), min(len(output), len(expected)))
    wanted = one.logits[number][:end]
    for rank in ranks:
        difference = float((rank.logits[number][:end] - wanted).abs().max())
        share = difference / float(wanted.abs().max())
        verdict.to_one_process = _larger(verdict.to_one_process, share)


def _larger(known: float, new: float) -> float:
    """Return the larger of two; a NaN stays, and is within no tolerance."""
    return max(known, new) if math.isfinite(known) and math.isfinite(new) else math.nan
