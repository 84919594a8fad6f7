"""Where an adapter begins to act is where PEFT has it begin."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from lorax_contract.activation import NEVER, activation_start

# Ids that look alike in their bytes, across the borders of ids too.
IDS = st.sampled_from([0, 1, 256, 257, 65536, 2**24, 7])


@given(
    prompt=st.lists(IDS, min_size=1, max_size=24), invocation=st.lists(IDS, min_size=1, max_size=3)
)
def test_the_last_invocation_counts_as_in_peft(prompt: list[int], invocation: list[int]) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    (offset,) = calculate_alora_offsets({"a": config}, "a", torch.tensor([prompt]))
    expected = NEVER if offset is None else len(prompt) - offset
    assert activation_start(prompt, invocation) == expected


def test_an_adapter_without_invocation_acts_from_the_first_token_on() -> None:
    assert activation_start([1, 2, 3], ()) == 0


def test_bytes_across_the_borders_of_ids_are_no_invocation() -> None:
    assert activation_start([1 << 24, 0], [1 << 16]) == NEVER
    assert activation_start([1 << 24, 1 << 16, 1 << 24], [1 << 24]) == 2
