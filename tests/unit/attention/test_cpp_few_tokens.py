"""Several tokens of a row at once, as drafts have them: the same as one after the other."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.paged_sequences import Sequences

from lorax_shard.attention import registry
from lorax_shard.attention.backend import AttentionSpec

if reason := registry.BACKENDS.probe("cpp", torch.device("cpu"), torch.float32):
    pytest.skip(f"cpp: {reason}", allow_module_level=True)

LENGTHS = [23, 41, 9, 60]


def sequences() -> Sequences:
    return Sequences(LENGTHS, device=torch.device("cpu"))


@pytest.mark.parametrize("spec", [AttentionSpec(0.25), AttentionSpec(0.25, window=5, softcap=3.0)])
def test_drafted_positions_are_those_of_single_tokens_bit_for_bit(spec: AttentionSpec) -> None:
    backend = registry.create("cpp", torch.device("cpu"), torch.float32)
    drafted = {0: 1, 1: 7, 2: 2, 3: 9}
    before = {row: LENGTHS[row] - num for row, num in drafted.items()}
    at_once, single = sequences(), sequences()
    for each in (at_once, single):
        each.fill(backend, before)
    together = at_once.step(backend, spec, drafted)
    for row, num in drafted.items():
        alone = [single.step(backend, spec, {row: 1})[row] for _ in range(num)]
        assert torch.equal(together[row], torch.cat(alone))


def test_long_prompts_beside_few_tokens() -> None:
    backend, spec = registry.create("cpp", torch.device("cpu"), torch.float32), AttentionSpec(0.25)
    rows = sequences()
    rows.check(backend, spec, {0: 20, 1: 16, 2: 8, 3: 17})
    rows.check(backend, spec, {0: 3, 1: 25, 2: 1, 3: 43})
