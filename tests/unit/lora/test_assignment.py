"""From rows of requests to rows of tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorax_shard.lora.assignment import Assignment, LoraStep, Segment, make_step

CPU = torch.device("cpu")


def step_of(
    lens: list[int], slots: list[int | None], logit_rows: list[int] | None = None
) -> LoraStep:
    rows = None if logit_rows is None else np.array(logit_rows, dtype=np.int64)
    step = make_step(lens, slots, rows, CPU)
    assert step is not None
    return step


def test_base_rows_alone_make_no_step() -> None:
    assert make_step([1, 5], [None, None], None, CPU) is None


def test_neighbours_of_one_slot_become_one_segment() -> None:
    tokens = step_of([1, 1, 3, 2, 4], [7, 7, None, 2, 2]).tokens
    assert tokens.segments == [Segment(7, 0, 2), Segment(2, 5, 11)]
    assert tokens.slots == (2, 7)
    assert tokens.mask == 0b10000100
    assert tokens.num_rows == 11


def test_slots_known_from_runs_are_those_that_have_rows() -> None:
    tokens = step_of([2, 0, 1, 1], [5, 3, None, 0]).tokens
    assert tokens.slots == (0, 5) == Assignment(tokens.slot_of_row, CPU).slots


def test_rows_of_a_slot_are_a_slice_or_numbers() -> None:
    tokens = step_of([1, 2, 1, 1], [0, 1, 0, None]).tokens
    assert tokens.rows(1) == slice(1, 3)
    numbers = tokens.rows(0)
    assert isinstance(numbers, torch.Tensor)
    assert numbers.tolist() == [0, 3]


def test_logit_rows_are_assigned_by_their_tokens() -> None:
    step = step_of([1, 4, 3], [3, None, 1], [7, 0, 4, 5])
    assert step.logits.slot_of_row.tolist() == [1, 3, -1, 1]
    assert step.logits.num_rows == 4
    assert step.logits.rows(3) == slice(1, 2)


def test_a_step_of_decodes_has_one_assignment() -> None:
    step = step_of([1, 1], [0, 1], [0, 1])
    assert step.logits is step.tokens


def test_logit_rows_in_another_order_are_their_own() -> None:
    step = step_of([1, 1], [0, 1], [1, 0])
    assert step.logits.slot_of_row.tolist() == [1, 0]


def test_no_logit_rows() -> None:
    step = step_of([3], [5], [])
    assert step.logits.num_rows == 0
    assert step.logits.slots == ()


def test_logit_rows_may_be_a_tensor() -> None:
    step = make_step([2, 1], [4, None], torch.tensor([2, 1]), CPU)
    assert step is not None
    assert step.logits.slot_of_row.tolist() == [-1, 4]


def test_rows_on_a_device_are_waited_for_only_where_an_adapter_changes_the_head() -> None:
    """Few do; of all others no step waits for what the device still computes."""
    unread = torch.empty(2, dtype=torch.int64, device="meta")
    step = make_step([1, 1], [0, 1], unread, CPU)
    assert step is not None
    assert step.tokens.slots == (0, 1)
    step.end()
    with pytest.raises(NotImplementedError):
        _ = step.logits
