"""Adapters on experts in one batch with others and the base: PEFT's logits, on one rank and three."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.helpers.expert_rows import FAMILIES, SLOTS, ExpertRows
from tests.helpers.paged_runner import RELATIVE_TOLERANCE, Fault, LogitsDifferError
from tests.helpers.schedules import SCHEDULES, chunked, ragged

from lorax_shard.lora.delta import ModuleDelta


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_adapters_of_a_mixture(family: str, tmp_path: Path) -> None:
    rows = ExpertRows(family, tmp_path)
    for row, slot in enumerate(SLOTS):
        shift = (rows.expected[row] - rows.base[row]).abs().max() / rows.base[row].abs().max()
        assert (float(shift) > 100 * RELATIVE_TOLERANCE) == (slot is not None)
    largest = max(rows.run(schedule) for schedule in SCHEDULES)
    print(f"FIGURE {family} {largest:.1e}")
    together = rows.run_ranks(chunked, 3)
    print(f"FIGURE {family} on 3 ranks {together:.1e}")


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExpertRows:
    return ExpertRows(request.param, tmp_path_factory.mktemp(request.param))


def wrong_expert(delta: ModuleDelta) -> ModuleDelta:
    assert delta.a is not None
    assert delta.b is not None
    return dataclasses.replace(delta, a=delta.a.roll(1, 0), b=delta.b.roll(1, 0))


def factor_of_another(delta: ModuleDelta) -> ModuleDelta:
    assert delta.b is not None
    return dataclasses.replace(delta, b=delta.b.flip(0))


def ranks_in_another_order(delta: ModuleDelta) -> ModuleDelta:
    assert delta.a is not None
    # As if rows were experts by ranks, not ranks by experts.
    turned = delta.a.transpose(0, 1).reshape(delta.a.shape)
    return dataclasses.replace(delta, a=turned.contiguous())


def scale_of_one_expert_lost(delta: ModuleDelta) -> ModuleDelta:
    assert delta.b is not None
    b = delta.b.clone()
    b[1] /= delta.scaling
    return dataclasses.replace(delta, b=b)


@pytest.mark.parametrize(
    "fault", [wrong_expert, factor_of_another, ranks_in_another_order, scale_of_one_expert_lost]
)
@pytest.mark.parametrize("schedule", [ragged, chunked])
def test_fault_of_experts_is_found(rows: ExpertRows, schedule, fault) -> None:
    lora, slot = rows.model.lora, 0
    assert lora is not None
    whole = rows.adapters[slot]
    broken = {
        name: fault(delta) if delta.a is not None and delta.a.dim() == 3 else delta
        for name, delta in whole.modules.items()
    }
    lora.unload(slot)
    lora.load(slot, dataclasses.replace(whole, modules=broken))
    try:
        with pytest.raises(LogitsDifferError):
            rows.run(schedule)
    finally:
        lora.unload(slot)
        lora.load(slot, whole)
    rows.run(schedule)


@pytest.mark.parametrize("schedule", [ragged, chunked])
def test_fault_of_slots_is_found(rows: ExpertRows, schedule) -> None:
    for wrong in (
        tuple(2 if slot == 0 else slot for slot in SLOTS),
        tuple(None if slot == 5 else slot for slot in SLOTS),
        tuple(0 if slot is None else slot for slot in SLOTS),
    ):
        with pytest.raises(LogitsDifferError):
            rows.run(schedule, slots=wrong)
    with pytest.raises(LogitsDifferError):
        rows.run(schedule, Fault.LOST_BLOCK)


def test_what_other_rows_compute_does_not_change_a_row(rows: ExpertRows) -> None:
    """A base row beside adapters on experts is what it is by itself."""
    lora = rows.model.lora
    assert lora is not None
    found = []
    for slots in ((None,) * len(SLOTS), SLOTS):
        rows.slots = slots
        expected = list(rows.expected)
        if slots != SLOTS:
            rows.expected = list(rows.base)
        found.append(rows.run(ragged))
        rows.expected, rows.slots = expected, SLOTS
    assert max(found) < RELATIVE_TOLERANCE
    assert torch.isfinite(torch.tensor(found)).all()
