"""The kernel for CPUs: equal bits whatever runs beside a row, and calls that can be made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from lorax_shard.lora.assignment import Assignment, FixedAssignment
from lorax_shard.lora.backend import GroupWeights
from lorax_shard.lora.cpp import CppGroup, CppLora, pack
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.model import install
from lorax_shard.native import NativeFunction

CPU = torch.device("cpu")
WIDTH, OUTS = 75, (200, 33, 16)
COLUMNS = (0, 200, 233)
RANKS = ((8, 8, 8), (1, 3, 0), (16, 0, 2), (33, 17, 1))

pytestmark = pytest.mark.skipif(
    CppLora.probe(CPU, torch.float32) is not None, reason="no C++ compiler"
)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Loaded:
    """A backend with a group of siblings whose slots hold adapters of several ranks."""

    def __init__(self, width: int = WIDTH, outs: tuple[int, ...] = OUTS) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.backend = CppLora()
        self.group: CppGroup = self.backend.make_group(len(outs))
        self.width, self.outs = width, outs
        self.columns = tuple(np.cumsum([0, *outs[:-1]]).tolist())
        self.weights: list[GroupWeights] = []
        for ranks in RANKS:
            b = tuple(self.draw(r, out) if r else None for r, out in zip(ranks, outs))
            self.weights.append(GroupWeights(self.draw(sum(ranks[: len(outs)]), width), b))
        for slot, weights in enumerate(self.weights):
            self.group.load(slot, weights)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def apply(self, x: torch.Tensor, y: torch.Tensor, slots: list[int]) -> torch.Tensor:
        rows = Assignment(np.array(slots, dtype=np.int64), CPU)
        y = y.clone()
        self.group.expand_all(self.group.shrink(x, rows), self.columns, y, rows)
        return y


MIXES = {
    "decodes": [0, 1, -1, 2, 3, 0],
    "many of one": [2] * 7,
    "a prompt beside decodes": [*([0] * 131), 1, 2, 3, -1, 3],
    "two prompts": [*([3] * 60), *([1] * 49)],
    "adapters for each thread": [row % 4 for row in range(64)],
}


@pytest.mark.parametrize("mix", MIXES)
def test_threads_change_no_bit(mix: str) -> None:
    # Wide enough that threads share the work.
    loaded = Loaded(600, (640, 130, 30))
    slots = MIXES[mix]
    x, y = loaded.draw(len(slots), 600), loaded.draw(len(slots), 800)
    with threads(1):
        expected = loaded.apply(x, y, slots)
    for number in (2, 3, 5, 16):
        with threads(number):
            assert torch.equal(loaded.apply(x, y, slots), expected)


def test_threads_that_share_many_small_blocks_change_no_bit() -> None:
    backend, generator = CppLora(), torch.Generator().manual_seed(3)
    group = backend.make_group(1)
    for slot in range(120):
        rank = 8 + slot % 3
        a, b = (torch.randn(rank, n, generator=generator) for n in (96, 70))
        group.load(slot, GroupWeights(a, (b,)))
    # One to three rows of each, some loaded nowhere.
    orders = [torch.randperm(130, generator=generator)[:count] for count in (130, 70, 50)]
    numbers = torch.cat(orders).numpy()
    x, base = (torch.randn(250, n, generator=generator) for n in (96, 70))
    found = []
    for count in (1, 2, 3, 5):
        with threads(count):
            rows, y = Assignment(numbers, CPU), base.clone()
            group.expand(group.shrink(x, rows), 0, y, rows)
            found.append(y)
    assert all(torch.equal(each, found[0]) for each in found)
    changed = (found[0] != base).any(1)
    assert changed.tolist() == (numbers < 120).tolist()


@pytest.mark.parametrize("mix", MIXES)
def test_rows_beside_it_change_no_bit_of_a_row(mix: str) -> None:
    loaded = Loaded()
    slots = MIXES[mix]
    x, y = loaded.draw(len(slots), WIDTH), loaded.draw(len(slots), sum(OUTS))
    together = loaded.apply(x, y, slots)
    for row, slot in enumerate(slots):
        alone = loaded.apply(x[row : row + 1], y[row : row + 1], [slot])
        assert torch.equal(together[row : row + 1], alone)


def test_siblings_that_lie_apart_get_the_bits_that_they_get_together() -> None:
    loaded = Loaded()
    slots = MIXES["a prompt beside decodes"]
    x, y = loaded.draw(len(slots), WIDTH), loaded.draw(len(slots), sum(OUTS))
    rows = Assignment(np.array(slots, dtype=np.int64), CPU)
    shrunk = loaded.group.shrink(x, rows)
    parts = [part.clone() for part in torch.split(y, OUTS, dim=1)]
    for member, part in enumerate(parts):
        loaded.group.expand(shrunk, member, part, rows)
    assert torch.equal(torch.cat(parts, dim=1), loaded.apply(x, y, slots))


def packed(weights: GroupWeights) -> GroupWeights:
    """Return the same in panels."""

    def of(matrix: torch.Tensor) -> torch.Tensor:
        panels = torch.empty_like(matrix)
        pack(matrix, panels)
        return panels

    b = tuple(None if each is None else of(each) for each in weights.b)
    return GroupWeights(of(weights.a), b, weights.scales, in_panels=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "outs"), [(WIDTH, OUTS), (640, (640, 64, 32)), (15, (7, 1, 9))])
def test_panels_change_no_bit(width: int, outs: tuple[int, ...], dtype: torch.dtype) -> None:
    loaded, in_panels = Loaded(width, outs), Loaded(width, outs)
    for slot, weights in enumerate(loaded.weights):
        b = tuple(None if part is None else part.to(dtype) for part in weights.b)
        narrow = GroupWeights(weights.a.to(dtype), b, (0.3, 2.0, -1.5))
        for each, its in ((loaded, narrow), (in_panels, packed(narrow))):
            each.group.unload(slot)
            each.group.load(slot, its)
    for slots in MIXES.values():
        x, y = loaded.draw(len(slots), width), loaded.draw(len(slots), sum(outs))
        assert torch.equal(in_panels.apply(x, y, slots), loaded.apply(x, y, slots))


def test_panels_are_made_of_matrices_with_any_strides() -> None:
    matrix = torch.randn(37, 75, generator=torch.Generator().manual_seed(0)).bfloat16()
    panels = [torch.empty(75, 37, dtype=matrix.dtype) for _ in range(2)]
    pack(matrix.T, panels[0])
    pack(matrix.T.contiguous(), panels[1])
    assert torch.equal(*panels)
    assert torch.equal(panels[0].flatten().sort().values, matrix.flatten().sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_of_16_bits_count_as_if_they_were_widened_before(dtype: torch.dtype) -> None:
    loaded, widened = Loaded(), Loaded()
    slots = MIXES["a prompt beside decodes"]
    x, y = loaded.draw(len(slots), WIDTH), loaded.draw(len(slots), sum(OUTS))
    for slot, weights in enumerate(loaded.weights):
        # Subnormal numbers of float16 too.
        a, b = (weights.a * 1e-6).to(dtype), [None if b is None else b.to(dtype) for b in weights.b]
        scales = (0.3, 2.0, 1e5)
        for each, to in ((loaded, dtype), (widened, torch.float32)):
            each.group.unload(slot)
            parts = tuple(None if part is None else part.to(to) for part in b)
            each.group.load(slot, GroupWeights(a.to(to), parts, scales))
    assert torch.equal(loaded.apply(x, y, slots), widened.apply(x, y, slots))


def test_each_matrix_has_a_type_of_its_own() -> None:
    loaded = Loaded()
    x, y = loaded.draw(1, WIDTH), loaded.draw(1, sum(OUTS))
    a = loaded.draw(9, WIDTH).half()
    b = (
        loaded.draw(4, OUTS[0]).bfloat16(),
        loaded.draw(2, OUTS[1]),
        loaded.draw(3, OUTS[2]).half(),
    )
    loaded.group.unload(1)
    loaded.group.load(1, GroupWeights(a, b, (0.5, -3.0, 7.0)))
    h = x.double() @ a.double().T
    parts = zip((h[:, :4], h[:, 4:6], h[:, 6:]), b, (0.5, -3.0, 7.0))
    added = torch.cat([part @ each.double() * scale for part, each, scale in parts], dim=1)
    actual = loaded.apply(x, y, [1]).double()
    torch.testing.assert_close(actual, y.double() + added, rtol=1e-5, atol=1e-4)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What was called, to be called again."""
    found: list[Callable[[], None]] = []
    call = NativeFunction.__call__

    def record(function: NativeFunction, fields: bytes) -> None:
        found.append(lambda: call(function, fields))
        call(function, fields)

    monkeypatch.setattr(NativeFunction, "__call__", record)
    return found


def test_siblings_are_one_call(calls: list[Callable[[], None]]) -> None:
    loaded = Loaded()
    slots = MIXES["a prompt beside decodes"]
    loaded.apply(loaded.draw(len(slots), WIDTH), loaded.draw(len(slots), sum(OUTS)), slots)
    assert len(calls) == 1


def test_a_call_of_a_fixed_step_can_be_made_again_with_other_rows(
    calls: list[Callable[[], None]],
) -> None:
    loaded = Loaded()
    x, base = loaded.draw(140, WIDTH), loaded.draw(140, sum(OUTS))
    y = base.clone()
    rows = FixedAssignment(torch.full((4,), -1))
    loaded.backend.read_slots(rows, torch.tensor([-1, -1, 0, -1]))
    loaded.group.expand_all(loaded.group.shrink(x[:4], rows), COLUMNS, y[:4], rows)
    (again,) = calls
    assert torch.equal(y[:4], loaded.apply(x[:4], base[:4], [-1, -1, 0, -1]))
    for slots in (*MIXES.values(), [-1, -1]):
        loaded.backend.write_slots(np.array(slots, dtype=np.int64))
        y.copy_(base)
        again()
        count = len(slots)
        assert torch.equal(y[:count], loaded.apply(x[:count], base[:count], slots))
        assert torch.equal(y[count:], base[count:])


def test_a_kept_call_sees_adapters_that_came_and_went(calls: list[Callable[[], None]]) -> None:
    loaded = Loaded()
    x, base = loaded.draw(3, WIDTH), loaded.draw(3, sum(OUTS))
    y = base.clone()
    rows = FixedAssignment(torch.full((3,), -1))
    loaded.backend.read_slots(rows, torch.tensor([-1, -1, -1]))
    loaded.group.expand_all(loaded.group.shrink(x, rows), COLUMNS, y, rows)
    (again,) = calls
    # Far beyond the slots and the ranks that there were.
    weights = GroupWeights(loaded.draw(300, WIDTH), (loaded.draw(300, OUTS[0]), None, None))
    loaded.group.load(1000, weights)
    loaded.group.unload(2)
    slots = [1000, 2, 3]
    loaded.backend.write_slots(np.array(slots, dtype=np.int64))
    again()
    assert torch.equal(y, loaded.apply(x, base, slots))
    assert torch.equal(y[1], base[1])
    expected = base[0].double()
    assert weights.b[0] is not None
    expected[: OUTS[0]] += weights.b[0].double().T @ (weights.a.double() @ x[0].double())
    torch.testing.assert_close(y[0].double(), expected, rtol=1e-5, atol=1e-3)


def test_a_kept_call_sees_that_another_group_moved_the_table(
    calls: list[Callable[[], None]],
) -> None:
    loaded = Loaded()
    other = loaded.backend.make_group(1)
    x, base = loaded.draw(3, WIDTH), loaded.draw(3, sum(OUTS))
    y = base.clone()
    rows = FixedAssignment(torch.full((3,), -1))
    loaded.backend.read_slots(rows, torch.tensor([2, -1, 0]))
    loaded.group.expand_all(loaded.group.shrink(x, rows), COLUMNS, y, rows)
    (again,) = calls
    expected = y.clone()
    other.load(500, GroupWeights(loaded.draw(700, WIDTH), (loaded.draw(700, 4),)))
    y.copy_(base)
    again()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_adapter_takes_the_bytes_that_it_was_stored_with(dtype: torch.dtype) -> None:
    model = nn.Sequential()
    model.q_proj = nn.Linear(600, 500)
    lora = install(model, "cpp", CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 600), (500, 64)))
    # What no 16 bits hold: rounded into B it would show.
    delta = ModuleDelta(a=a, b=b, scaling=1 / 3)
    prepared = lora.prepare(HostAdapter(digest="d", modules={"q_proj": delta}))
    assert prepared.nbytes == 64 * 1100 * dtype.itemsize
    lora.load(0, prepared)
    x = torch.randn(5, 600, generator=generator)
    with lora.step([5], [0]):
        y = model(x)
    added = x.double() @ a.double().T @ b.double().T / 3
    expected = (
        torch.nn.functional.linear(x, model.q_proj.weight, model.q_proj.bias).double() + added
    )
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)


def test_a_fixed_step_of_a_model_computes_as_an_ordinary_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.q_proj, model.o_proj = nn.Linear(24, 24), nn.Linear(24, 24)
    lora = install(model, "cpp", CPU, torch.float32)
    for slot, name in ((0, "q_proj"), (2, "o_proj")):
        a, b = torch.randn(3, 24), torch.randn(24, 3)
        lora.load(slot, HostAdapter(digest=name, modules={name: ModuleDelta(a=a, b=b)}))
    slots, x = [2, None, 0, 2], torch.randn(4, 24)
    with lora.step([1] * 4, slots):
        expected = model(x)
    with lora.fixed(4, 8):
        assert lora.is_fixed(0) and lora.is_fixed(2)
        with lora.fixed_step(torch.tensor([2, -1, 0, 2])):
            assert torch.equal(model(x), expected)
    assert torch.equal(model(x), model.o_proj(model.q_proj(x)))
