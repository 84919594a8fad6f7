"""What the Triton backend promises beyond the contract: layouts, and what a graph may hold."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="triton does not run on this platform")

# After the question whether they can be.
from tests.helpers.fixed_lora import DEVICE, FixedGroup, assignment

from lorax_shard.lora.backend import GroupWeights
from lorax_shard.lora.triton import row_tiles
from lorax_shard.lora.triton.backend import TritonGroup

MOST_GATHERED = row_tiles.MOST_GATHERED[DEVICE.type]


def rows_of(layout: row_tiles.Tiles) -> dict[int, list[int]]:
    """Return the rows of each slot as the kernels find them."""
    found: dict[int, list[int]] = {}
    for slot, first, count in layout.tiles.tolist():
        assert 0 <= count <= layout.block_m
        if count:
            found.setdefault(slot, []).extend(layout.rows[first : first + count].tolist())
    return found


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33, 64, 65, 130, 1100])
@pytest.mark.parametrize("num_slots", [1, 3, 40])
def test_a_layout_has_each_adapter_row_once(count: int, num_slots: int) -> None:
    draw = random.Random(count * num_slots)
    slots = [draw.choice([-1, *range(num_slots)]) for _ in range(count)]
    layout = row_tiles.tiles_of(assignment(slots))
    assert len(layout.tiles) == layout.num_tiles
    expected: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected.setdefault(slot, []).append(row)
    assert rows_of(layout) == expected


def test_rows_of_one_slot_share_tiles() -> None:
    layout = row_tiles.tiles_of(assignment([7] * 40))
    assert layout.num_tiles == 40, "a grid depends on the number of rows alone"
    assert sorted(layout.tiles[:, 2].tolist())[-4:] == [0, 8, 16, 16]


def test_long_runs_take_large_tiles() -> None:
    few = row_tiles.tiles_of(assignment([row % 60 for row in range(600)]))
    long = row_tiles.tiles_of(assignment([1] * 500 + [0] * 100))
    assert few.block_m == row_tiles.FEW_ROWS
    assert long.block_m == row_tiles.MANY_ROWS
    assert long.num_tiles == 2 + 8


def test_slots_are_read_when_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FixedGroup(9)
    address = case.group._on_device.data_ptr()
    grids: list[tuple[int, ...]] = []
    for name in ("shrink", "expand"):
        kernel = getattr(row_tiles.kernels, name)
        spy = type("Spy", (), {"__getitem__": lambda _, g, k=kernel: grids.append(g) or k[g]})()
        monkeypatch.setattr(row_tiles.kernels, name, spy)
    case.replay()
    assert torch.equal(case.y, case.base), "nothing is loaded"
    case.load(2, 8, 3)
    case.load(31, 1, 23)
    case.slots.copy_(torch.tensor([2, -1, 31, 2, 2, -1, 31, 5, 2]))
    case.replay()
    case.check()
    del case.loaded[2]
    case.group.unload(2)
    case.load(5, 0, 7)
    case.slots.copy_(torch.tensor([5] * 5 + [2, 31, -1, 5]))
    case.replay()
    case.check()
    assert case.group._on_device.data_ptr() == address
    assert len(grids) == 6
    assert len(set(grids)) == 2, "one grid a kernel, whatever is loaded"


def test_adapters_come_in_inference_mode_and_go_outside_of_it() -> None:
    case = FixedGroup(2)
    group = TritonGroup(2)
    with torch.inference_mode():
        case.load(1, 4, 0)
        group.load(1, case.loaded[1])
    group.unload(1)
    group.load(1, case.loaded[1])
    case.group = group
    case.slots.copy_(torch.tensor([1, -1]))
    case.replay()
    case.check()


def test_too_many_rows_for_fixed_slots_are_refused() -> None:
    rows = assignment([-1] * (MOST_GATHERED + 1))
    slots = torch.zeros(MOST_GATHERED + 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=f"at most {MOST_GATHERED}"):
        row_tiles.read_slots_from(rows, slots)


def test_only_what_lies_in_lines_of_sixteen_bytes_is_read_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = FixedGroup(2)
    case.group = TritonGroup(2)
    b = (case.draw(4, 16), case.draw(4, 16))
    case.group.load(0, GroupWeights(case.draw(8, 32), b))
    units: list[int] = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **names: units.append(names["unit"])

    monkeypatch.setattr(row_tiles.kernels, "expand", Spy())
    rows, x, y = assignment([0, 0]), case.draw(2, 32), case.draw(2, 64)
    for columns in ((0, 16), (0, 17), (32, 48)):
        case.group.expand_all(case.group.shrink(x, rows), columns, y, rows)
    assert units == [16, 1, 16]


def test_matrices_that_lie_oddly_are_still_read() -> None:
    case = FixedGroup(4)
    # One element into its storage: no 16-byte boundary anywhere.
    case.load(0, 4, 4)
    shifted = torch.empty(8 * 20 + 1, device=DEVICE)[1:].view(8, 20).copy_(case.loaded[0].a)
    group = case.group = TritonGroup(2)
    case.loaded[0] = GroupWeights(shifted, case.loaded[0].b)
    group.load(0, case.loaded[0])
    assert group._unit == 1
    case.slots.fill_(0)
    case.replay()
    case.check()
