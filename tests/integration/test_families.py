"""Every tested family: decodes and prompts, chunks, base rows and rows of two adapters in one
batch, against stock transformers and PEFT, row by row.

The same comparison is also run with faults planted, to show that it finds them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.family_rows import SLOTS, TARGETS, FamilyRows
from tests.helpers.paged_runner import RELATIVE_TOLERANCE, Fault, LogitsDifferError
from tests.helpers.schedules import SCHEDULES, chunked, preempted, ragged
from transformers import LlamaConfig

from lorax_shard.model import attention_hook
from lorax_shard.model.families import TESTED_FAMILIES
from lorax_shard.parallel.families import PLANS

# One for each kind of attention and of positions.
FAULTY = ("gemma2", "gpt2", "gpt_oss", "llama4_text", "mistral")


def test_the_list_is_what_is_tested_and_promises_enough() -> None:
    assert TARGETS.keys() == TESTED_FAMILIES
    assert len(TESTED_FAMILIES) >= 20


@pytest.mark.parametrize("family", sorted(TESTED_FAMILIES))
def test_family_with_two_adapters(family: str, tmp_path: Path) -> None:
    rows = FamilyRows(family, tmp_path)
    assert rows.model.model_type == family
    for row, slot in enumerate(SLOTS):
        shift = (rows.expected[row] - rows.base[row]).abs().max() / rows.base[row].abs().max()
        assert (float(shift) > 100 * RELATIVE_TOLERANCE) == (slot is not None)
    largest = max(rows.run(schedule) for schedule in SCHEDULES)
    print(f"FIGURE {family} {largest:.1e}")
    with pytest.raises(LogitsDifferError):
        rows.run(chunked, Fault.LOST_BLOCK)
    # An uneven share of heads, or fewer key heads than ranks.
    together = rows.run_ranks(chunked, 3)
    print(f"FIGURE {family} on 3 ranks {together:.1e}")


# What tomorrow's release may put into a plan: at a linear, at the block around linears.
NEW_STYLES = (
    {"layers.*.mlp.up_proj": "colwise_as_never_before"},
    {"layers.*.self_attn": "attention_as_never_before"},
)


@pytest.mark.parametrize("new", NEW_STYLES)
def test_a_style_that_is_not_known_costs_a_copy_of_its_block_and_no_answer(
    new: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = dict(LlamaConfig.base_model_tp_plan or {})
    monkeypatch.setitem(PLANS, "llama", new | {k: v for k, v in stock.items() if k not in new})
    rows = FamilyRows("llama", tmp_path)
    assert rows.run_ranks(chunked, 3) < RELATIVE_TOLERANCE


@pytest.fixture(scope="module", params=FAULTY)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyRows:
    return FamilyRows(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("schedule", [chunked, preempted])
@pytest.mark.parametrize("fault", [Fault.LOST_BLOCK, Fault.POSITION_OFF_BY_ONE])
def test_fault_of_the_server_is_found(rows: FamilyRows, schedule, fault: Fault) -> None:
    with pytest.raises(LogitsDifferError):
        rows.run(schedule, fault)


IGNORED = {
    "gemma2": (Fault.WINDOW_IGNORED, Fault.SOFTCAP_IGNORED),
    "gpt2": (),
    "gpt_oss": (Fault.WINDOW_IGNORED, Fault.SINKS_IGNORED),
    "llama4_text": (Fault.CHUNK_IGNORED,),
    "mistral": (Fault.WINDOW_IGNORED,),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "fault",
    [Fault.WINDOW_IGNORED, Fault.CHUNK_IGNORED, Fault.SINKS_IGNORED, Fault.SOFTCAP_IGNORED],
)
def test_ignored_part_of_attention_is_found(rows: FamilyRows, schedule, fault: Fault) -> None:
    if fault not in IGNORED[rows.model.model_type]:
        rows.run(schedule, fault)  # there is none to ignore
        return
    with pytest.raises(LogitsDifferError):
        rows.run(schedule, fault)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_temperature_by_place_in_the_batch_is_found(
    rows: FamilyRows, schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_hook, "_temperature_correction", lambda *_: torch.ones(1))
    if rows.model.model_type != "llama4_text":
        rows.run(schedule)
        return
    with pytest.raises(LogitsDifferError):
        rows.run(schedule)


@pytest.mark.parametrize(
    "slots",
    [
        pytest.param((0, None, None, 0, 1, None), id="an adapter's row as base"),
        pytest.param((0, 1, 1, 0, 1, None), id="a base row with an adapter"),
        pytest.param((1, 0, None, 1, 0, None), id="adapters swapped"),
        pytest.param((0, 1, None, 1, 1, None), id="one row's adapter"),
        pytest.param((2, 1, None, 0, 1, None), id="scaling off by 2 %"),
    ],
)
@pytest.mark.parametrize("schedule", [ragged, chunked])
def test_wrong_adapter_is_found(rows: FamilyRows, schedule, slots: tuple[int | None, ...]) -> None:
    assert rows.model.lora is not None
    if 2 in slots:
        rows.load_scaled(2, of=0, factor=1.02)
    try:
        with pytest.raises(LogitsDifferError):
            rows.run(schedule, slots=slots)
    finally:
        if 2 in slots:
            rows.model.lora.unload(2)
