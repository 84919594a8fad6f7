"""Heads of few labels of several slots are one product, and rows get what their own slot has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from lorax_shard.lora.assignment import BASE, Assignment
from lorax_shard.lora.prepared import LinearChange
from lorax_shard.lora.stacked import StackedWeights, are_narrow

WIDTH_IN = 24
CPU = torch.device("cpu")


def head(num_labels: int, *, has_bias: bool = True) -> LinearChange:
    bias = torch.randn(num_labels) if has_bias else None
    return LinearChange(weight=torch.randn(num_labels, WIDTH_IN), bias=bias)


def test_each_row_has_the_outputs_of_its_own_slot() -> None:
    torch.manual_seed(0)
    heads = {2: head(3), 5: head(1, has_bias=False), 9: head(6)}
    slot_of_row = np.array([9, 2, BASE, 5, 2, 7, 9])
    x, y = torch.randn(len(slot_of_row), WIDTH_IN), torch.randn(len(slot_of_row), 6)
    assert are_narrow([*heads.values()])
    stacked = StackedWeights.of((2, 5, 9), [*heads.values()], 6)
    found = stacked.compute(x, y, Assignment(slot_of_row, CPU))
    for row, slot in enumerate(slot_of_row.tolist()):
        change = heads.get(slot)
        if change is None:
            assert torch.equal(found[row], y[row])
            continue
        assert change.weight is not None
        width = len(change.weight)
        own = functional.linear(x[row], change.weight, change.bias)
        torch.testing.assert_close(found[row, :width], own)
        assert bool(torch.isneginf(found[row, width:]).all())


def test_numbers_that_are_none_stay_those_of_their_slot() -> None:
    broken, whole = head(2), head(2)
    assert broken.weight is not None
    broken.weight.fill_(float("nan"))
    stacked = StackedWeights.of((0, 1), [broken, whole], 2)
    x, y = torch.randn(2, WIDTH_IN), torch.zeros(2, 2)
    found = stacked.compute(x, y, Assignment(np.array([0, 1]), CPU))
    assert bool(found[0].isnan().all())
    assert bool(found[1].isfinite().all())


@pytest.mark.parametrize(
    "changes",
    [
        [head(3)],
        [head(300), head(300)],
        [head(3), LinearChange(scale=torch.ones(3))],
        [head(3), LinearChange(weight=torch.ones(3, WIDTH_IN), shift=torch.ones(3))],
    ],
    ids=["one alone", "too wide", "no weight", "more than a weight"],
)
def test_others_are_computed_one_by_one(changes: list[LinearChange]) -> None:
    assert not are_narrow(changes)
