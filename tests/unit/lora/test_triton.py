"""What the Triton backend promises beyond the contract: layouts, and what a graph may hold."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton does not run on this platform")

# After the question whether they can be.
from tests.helpers.fixed_lora import DEVICE, FixedGroup, assignment

from lorax_shard.lora.backend import GroupWeights
from lorax_shard.lora.triton import row_tiles
from lorax_shard.lora.triton.backend import TritonLora

MOST_GATHERED = row_tiles.MOST_GATHERED


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
    assert layout.tiles[:, 2].tolist() == [16, 16, 8]


def test_a_grid_has_no_tile_without_rows_where_the_slots_are_known() -> None:
    slots = [row % 5 - 1 for row in range(300)]
    assert row_tiles.tiles_of(assignment(slots)).num_tiles == 4 * 4


def test_a_grid_depends_on_the_number_of_rows_alone_where_slots_are_read_later() -> None:
    rows = assignment([-1] * 40)
    for slots in ([7] * 40, [*range(39), -1], [-1] * 40):
        row_tiles.read_slots_from(rows, torch.tensor(slots, device=DEVICE))
        layout = row_tiles.tiles_of(rows)
        assert layout.num_tiles == len(layout.tiles) == 40
        found = rows_of(layout)
        assert sorted(row for each in found.values() for row in each) == [
            row for row, slot in enumerate(slots) if slot >= 0
        ]
        assert found.keys() == {slot for slot in slots if slot >= 0}


def test_long_runs_take_large_tiles() -> None:
    few = row_tiles.tiles_of(assignment([row % 60 for row in range(600)]))
    long = row_tiles.tiles_of(assignment([1] * 500 + [0] * 100))
    assert few.block_m == row_tiles.FEW_ROWS
    assert long.block_m == row_tiles.MANY_ROWS
    assert long.num_tiles == 2 + 8


def test_slots_are_read_when_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FixedGroup(9)
    address = case.backend._slots.lines.data_ptr()
    seen = [spy_on(monkeypatch, name) for name in ("shrink", "expand")]
    case.replay()
    assert torch.equal(case.y, case.base), "nothing is loaded"
    case.load(2, 8, 3)
    case.load(31, 1, 23)
    case.slots.copy_(torch.tensor([2, -1, 31, 2, 2, -1, 31, 5, 2]))
    case.replay()
    case.check()
    del case.loaded[2]
    case.group.unload(2)
    case.backend.commit(DEVICE)
    case.load(5, 0, 7)
    case.slots.copy_(torch.tensor([5] * 5 + [2, 31, -1, 5]))
    case.replay()
    case.check()
    assert case.backend._slots.lines.data_ptr() == address
    for launches in seen:
        assert len(launches) == 3
        assert all(each == launches[0] for each in launches), "the same whatever is loaded"


def test_a_device_may_go_by_several_names() -> None:
    """A tensor's device has a number, the device that a model was put on may have none."""
    case = FixedGroup(2)
    address = case.backend._slots.lines.data_ptr()
    case.group.load(1, case.weights(3, 2))
    case.backend.commit(torch.device(DEVICE.type, 0))
    assert case.backend._slots.lines.data_ptr() == address
    assert case.backend._slots.lines[1].any()


def test_adapters_come_in_inference_mode_and_go_outside_of_it() -> None:
    case = FixedGroup(2)
    backend = TritonLora()
    group = backend.make_group(2)
    with torch.inference_mode():
        case.load(1, 4, 0)
        group.load(1, case.loaded[1])
        backend.commit(DEVICE)
    group.unload(1)
    backend.commit(DEVICE)
    group.load(1, case.loaded[1])
    backend.commit(DEVICE)
    case.group = group
    case.slots.copy_(torch.tensor([1, -1]))
    case.replay()
    case.check()


def test_slots_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="4 slots for 3 rows"):
        row_tiles.read_slots_from(assignment([-1] * 3), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("most", [-1, 0, 3, 70])
def test_many_rows_are_laid_out_on_the_device(most: int) -> None:
    slots = torch.randint(-1, most + 1, (MOST_GATHERED + 300,), device=DEVICE)
    rows = assignment([-1] * len(slots))
    row_tiles.read_slots_from(rows, slots)
    tiles = row_tiles.tiles_of(rows)
    used = tiles.tiles[: int(tiles.num_used)]
    seen: list[int] = []
    for slot, first, count in used.tolist():
        assert 1 <= count <= tiles.block_m
        of_tile = tiles.rows[first : first + count]
        assert (slots[of_tile] == slot).all()
        seen += of_tile.tolist()
    assert sorted(seen) == torch.nonzero(slots >= 0).flatten().tolist()
    assert not tiles.tiles[len(used) :].any()


def spy_on(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """Note what a kernel is launched with."""
    kernel, seen = getattr(row_tiles.kernels, name), []

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **names: (
                seen.append({"grid": grid, **names}) or kernel[grid](*args, **names)
            )

    monkeypatch.setattr(row_tiles.kernels, name, Spy())
    return seen


def test_only_widths_of_whole_lines_are_read_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FixedGroup(2)
    backend = TritonLora()
    group = backend.make_group(2)
    seen = spy_on(monkeypatch, "expand")
    rows, x, y = assignment([0, 0]), case.draw(2, 32), case.draw(2, 64)
    for width, starts in ((16, ((0, 16), (0, 17), (32, 48))), (12, ((0, 16),))):
        group.load(0, GroupWeights(case.draw(8, 32), (case.draw(4, 16), case.draw(4, width))))
        backend.commit(DEVICE)
        for columns in starts:
            group.expand_all(group.shrink(x, rows), columns, y, rows)
        group.unload(0)
    assert [each["unit"] for each in seen] == [16, 1, 16, 1]


def test_a_fixed_group_reads_whole_lines_and_refuses_what_it_is_not_fixed_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = FixedGroup(4, widths=(32, 16))
    seen = spy_on(monkeypatch, "expand")
    case.load(3, 5, 7)
    case.slots.fill_(3)
    case.replay()
    case.check()
    assert [each["unit"] for each in seen] == [16]
    a = case.draw(8, 20)
    for b in ((case.draw(8, 33), None), (case.draw(8, 31), None), (None, case.draw(8, 32))):
        with pytest.raises(ValueError, match="in a group that is fixed for"):
            case.group.load(4, GroupWeights(a, b))
    with pytest.raises(ValueError, match="25 ranks in a group that is fixed for 24"):
        case.group.load(4, GroupWeights(case.draw(25, 20), (case.draw(25, 32), None)))


def test_matrices_that_lie_oddly_are_still_read() -> None:
    case = FixedGroup(4)
    # One element into its storage: no 16-byte boundary anywhere.
    case.load(0, 4, 4)
    shifted = torch.empty(8 * 20 + 1, device=DEVICE)[1:].view(8, 20).copy_(case.loaded[0].a)
    case.loaded[1] = GroupWeights(shifted, case.loaded[0].b)
    case.group.load(1, case.loaded[1])
    case.backend.commit(DEVICE)
    assert all(int(address) % 16 == 0 for address in case.backend._slots.lines[1, [0, 2, 6]])
    case.slots.fill_(1)
    case.replay()
    case.check()


@pytest.mark.parametrize("ranks", [(64, 0), (65, 3), (3, 150), (300, 0)])
def test_many_ranks_are_taken_in_blocks(ranks: tuple[int, int]) -> None:
    """More of them than one product takes, and than one program of each share."""
    case = FixedGroup(3)
    case.backend = TritonLora()
    case.group = case.backend.make_group(2)
    case.load(0, *ranks)
    case.load(2, 1, 1)
    case.slots.copy_(torch.tensor([0, 2, -1]))
    case.replay()
    case.check()


@pytest.mark.parametrize("num_rows", [1, 33, 256])
def test_room_for_large_ranks_adds_few_programs(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a device takes at once, however many rows there are."""
    programs = []
    for ranks in (24, 1536):
        case = FixedGroup(num_rows)
        case.group.reserve(ranks=ranks, widths=[16, 8])
        seen = spy_on(monkeypatch, "shrink")
        case.load(0, 8, 8)
        case.slots.fill_(0)
        case.replay()
        case.check()
        programs.append(math.prod(seen[0]["grid"]))
    assert max(programs) <= 1024


@pytest.mark.parametrize("num_rows", [1, 64, 256])
def test_programs_without_work_are_few(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step's slots are known, each program of the grids has something to compute."""
    case = FixedGroup(num_rows)
    backend = TritonLora()
    group = backend.make_group(2)
    for slot in range(4):
        group.load(slot, GroupWeights(case.draw(16, 32), (case.draw(8, 16), case.draw(8, 16))))
    backend.commit(DEVICE)
    seen = [spy_on(monkeypatch, name) for name in ("shrink", "expand")]
    rows = assignment([row % 4 for row in range(num_rows)])
    num_tiles = min(num_rows, 4) * -(-num_rows // 64)
    group.expand_all(
        group.shrink(case.draw(num_rows, 32), rows), (0, 16), case.draw(num_rows, 32), rows
    )
    assert [each[0]["grid"] for each in seen] == [(num_tiles, 1), (num_tiles, 1, 2)]


def test_parts_of_the_input_are_few_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TritonLora()
    group = backend.make_group(1)
    group.load(0, GroupWeights(torch.zeros(1, 4096, device=DEVICE), (torch.zeros(1, 16),)))
    backend.commit(DEVICE)
    seen = []
    monkeypatch.setattr(group, "_launch_shrink", lambda x, h, tiles: seen.append(h.shape[0]))
    for count in range(1, MOST_GATHERED + 1, 7):
        x = torch.zeros(count, 4096, device=DEVICE)
        group.shrink(x, assignment([row % 40 - 1 if row % 2 else 0 for row in range(count)]))
    assert set(seen) <= {1, 2, 4, 8}
