"""Every LoRA backend that can run here, against a naive float64 oracle.

The oracle takes one row after the other. Triton runs in its interpreter where there is no
GPU.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lorax_shard.lora import registry
from lorax_shard.lora.assignment import Assignment
from lorax_shard.lora.backend import ExpertsWeights, GroupWeights, LoraBackend, LoraGroup
from lorax_shard.lora.experts import FactorsOfPairs
from lorax_shard.mixture.pairs import CpuPairs, Pairs, ToldFunction, TorchPairs, probe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Largest difference to the oracle, relative to the largest output. With 16 bits the shrunk rows
# are rounded too, and so are B's products where a library sums them in parts.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# Slots of rows; None is a base row. Runs are prompt chunks, single rows are decodes.
PATTERNS: dict[str, list[int | None]] = {
    "nothing": [None] * 3,
    "one row": [2],
    "identical": [1] * 9,
    "distinct": [0, 1, 2, 3, 4, 5],
    "base rows between": [None, 0, None, None, 3, None],
    "uniform, scattered": [row % 6 for row in range(31)],
    "skewed": [0] * 13 + [4, None, 0, 5, 0, 0, None],
    "decodes, then a prompt": [3, 0, None, 3, 5, *([1] * 40)],
    "two chunks of one adapter": [2, *([4] * 30), *([None] * 5), *([4] * 26), *([5] * 25)],
    "prompt beside its own decode": [4, 1, *([4] * 33), 0],
    # Around 32 rows in a run: where the library's products take over from the kernel.
    "long and not quite": [*([0] * 31), None, *([1] * 32), None, *([2] * 33), 0],
    "more rows than a tile": [*([0, 1] * 70), *([2] * 17)],
}
# Width of the input and of each member.
SHAPES: dict[str, tuple[int, tuple[int, ...]]] = {
    "single": (48, (48,)),
    "siblings": (64, (64, 16, 16)),
    "odd": (37, (5, 131)),
    "tiny": (1, (1, 3)),
    "wide": (1100, (640, 17)),
}
# Of each slot: the rank of each member (the first ones of them where a shape has fewer); 0: none.
RANKS = ((8, 8, 8), (1, 3, 0), (16, 0, 2), (0, 5, 64), (33, 17, 1), (64, 64, 64))


@pytest.fixture(params=registry.BACKENDS.names)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backend(name: str) -> LoraBackend:
    return create(name, torch.float32)


def create(name: str, dtype: torch.dtype) -> LoraBackend:
    if reason := registry.BACKENDS.probe(name, DEVICE, dtype):
        pytest.skip(f"{name}: {reason}")
    return registry.BACKENDS.create(name, DEVICE, dtype)


@dataclass
class Case:
    """A group with loaded slots, and inputs and outputs of a step."""

    shape: str
    pattern: str
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        width, outs = SHAPES[self.shape]
        slots = PATTERNS[self.pattern]
        self.slots = slots
        of_row = np.array([-1 if slot is None else slot for slot in slots], dtype=np.int64)
        self.rows = Assignment(of_row, DEVICE)
        self.x = self.draw(len(slots), width)
        self.base = [self.draw(len(slots), out) for out in outs]
        self.weights = {
            slot: self.make(width, outs, ranks)
            for slot, ranks in enumerate(RANKS)
            if any(ranks[: len(outs)])
        }

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    def make(self, width: int, outs: tuple[int, ...], ranks: tuple[int, ...]) -> GroupWeights:
        used = ranks[: len(outs)]
        b = tuple(self.draw(r, out) * 0.3 if r else None for r, out in zip(used, outs))
        return GroupWeights(self.draw(sum(used), width) * 0.3, b)

    def expected(
        self, member: int, *, loaded: dict[int, GroupWeights] | None = None
    ) -> torch.Tensor:
        loaded = self.weights if loaded is None else loaded
        y = self.base[member].double().clone()
        for row, slot in enumerate(self.slots):
            weights = None if slot is None else loaded.get(slot)
            b = None if weights is None else weights.b[member]
            if weights is not None and b is not None:
                start = sum(each.shape[0] for each in weights.b[:member] if each is not None)
                a = weights.a.double()[start : start + b.shape[0]]
                y[row] += (a @ self.x[row].double()) @ b.double()
        return y

    def check(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        scale = float(expected.abs().max())
        difference = float((actual.double() - expected).abs().max())
        assert difference <= TOLERANCES[self.dtype] * scale


def run(backend: LoraBackend, case: Case) -> None:
    group = backend.make_group(len(case.base))
    for slot, weights in case.weights.items():
        group.load(slot, weights)
    backend.commit(DEVICE)
    shrunk = group.shrink(case.x, case.rows)
    for member, base in enumerate(case.base):
        y = base.clone()
        group.expand(shrunk, member, y, case.rows)
        case.check(y, case.expected(member))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", ["single", "siblings", "odd"])
def test_equals_oracle(backend: LoraBackend, shape: str, pattern: str) -> None:
    run(backend, Case(shape, pattern))


@pytest.mark.parametrize("shape", ["tiny", "wide"])
def test_equals_oracle_for_extreme_widths(backend: LoraBackend, shape: str) -> None:
    run(backend, Case(shape, "decodes, then a prompt"))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "pattern",
    ["identical", "distinct", "uniform, scattered", "skewed", "two chunks of one adapter"],
)
def test_equals_oracle_in_each_dtype(name: str, dtype: torch.dtype, pattern: str) -> None:
    run(create(name, dtype), Case("siblings", pattern, dtype))


@pytest.mark.parametrize("rank", [*range(1, 20), 31, 32, 33, 48, 63, 64])
def test_any_rank(backend: LoraBackend, rank: int) -> None:
    case = Case("single", "decodes, then a prompt")
    case.weights = {slot: case.make(48, (48,), (rank,)) for slot in (0, 1, 3, 5)}
    run(backend, case)


def test_random_mixes(backend: LoraBackend) -> None:
    draw = random.Random(2)
    for seed in range(6):
        lens = [draw.choice([1, 1, 1, 2, 5, 31, 50]) for _ in range(draw.randrange(1, 9))]
        slots = [slot for n in lens for slot in [draw.choice([None, 0, 1, 2, 3, 4, 5])] * n]
        PATTERNS["random"] = slots
        run(backend, Case("siblings", "random", seed=seed))
    del PATTERNS["random"]


def test_writes_into_a_slice_of_a_wider_tensor(backend: LoraBackend) -> None:
    case = Case("siblings", "base rows between")
    group = backend.make_group(3)
    for slot, weights in case.weights.items():
        group.load(slot, weights)
    backend.commit(DEVICE)
    # As stacked linears hand them out: each member's output is some columns of one tensor.
    stacked = torch.cat(case.base, dim=1)
    wide = torch.nn.functional.pad(stacked, (3, 7), value=5.0)
    shrunk = group.shrink(torch.cat([case.x, case.x], dim=1)[:, 64:], case.rows)
    start = 3
    for member, base in enumerate(case.base):
        group.expand(shrunk, member, wide[:, start : start + base.shape[1]], case.rows)
        start += base.shape[1]
    case.check(wide[:, 3:-7], torch.cat([case.expected(member) for member in range(3)], dim=1))
    assert torch.equal(wide[:, :3], torch.full_like(wide[:, :3], 5.0))
    assert torch.equal(wide[:, -7:], torch.full_like(wide[:, -7:], 5.0))


@pytest.mark.parametrize("shape", ["siblings", "odd"])
def test_all_members_at_once(backend: LoraBackend, shape: str) -> None:
    case = Case(shape, "skewed")
    group = backend.make_group(len(case.base))
    for slot, weights in case.weights.items():
        group.load(slot, weights)
    backend.commit(DEVICE)
    wide = torch.nn.functional.pad(torch.cat(case.base, dim=1), (3, 7), value=5.0)
    starts = np.cumsum([0, *(base.shape[1] for base in case.base[:-1])]).tolist()
    group.expand_all(group.shrink(case.x, case.rows), tuple(starts), wide[:, 3:], case.rows)
    members = range(len(case.base))
    case.check(wide[:, 3:-7], torch.cat([case.expected(member) for member in members], dim=1))
    assert torch.equal(wide[:, :3], torch.full_like(wide[:, :3], 5.0))
    assert torch.equal(wide[:, -7:], torch.full_like(wide[:, -7:], 5.0))


def test_an_output_may_be_wider_than_b(backend: LoraBackend) -> None:
    case = Case("single", "distinct")
    group = backend.make_group(1)
    for slot, weights in case.weights.items():
        group.load(slot, weights)
    backend.commit(DEVICE)
    wide = torch.nn.functional.pad(case.base[0], (0, 9))
    group.expand(group.shrink(case.x, case.rows), 0, wide, case.rows)
    case.check(wide[:, :-9], case.expected(0))
    assert not wide[:, -9:].any()


def test_rows_of_other_slots_keep_every_bit(backend: LoraBackend) -> None:
    case = Case("single", "skewed")
    group = backend.make_group(1)
    group.load(4, case.weights[4])
    backend.commit(DEVICE)
    y = case.base[0].clone()
    group.expand(group.shrink(case.x, case.rows), 0, y, case.rows)
    others = [row for row, slot in enumerate(case.slots) if slot != 4]
    assert torch.equal(y[others], case.base[0][others])
    assert not torch.equal(y, case.base[0])


def test_slots_come_and_go(backend: LoraBackend) -> None:
    case = Case("siblings", "distinct")
    group = backend.make_group(3)
    loaded: dict[int, GroupWeights] = {}

    def check() -> None:
        shrunk = group.shrink(case.x, case.rows)
        for member, base in enumerate(case.base):
            y = base.clone()
            group.expand(shrunk, member, y, case.rows)
            case.check(y, case.expected(member, loaded=loaded))

    def load(slot: int, weights: GroupWeights) -> None:
        group.load(slot, weights)
        backend.commit(DEVICE)
        loaded[slot] = weights

    def unload(slot: int) -> None:
        group.unload(slot)
        backend.commit(DEVICE)
        del loaded[slot]

    check()
    load(5, case.weights[5])
    check()
    load(1, case.weights[1])
    # Far beyond the slots that were there so far.
    load(40, case.weights[4])
    check()
    unload(5)
    check()
    load(5, case.make(64, (64, 16, 16), (2, 2, 0)))
    unload(1)
    check()
    unload(40)
    unload(5)
    check()


def test_slots_that_the_group_never_had_cost_nothing(backend: LoraBackend) -> None:
    case = Case("siblings", "distinct")
    # Other modules hold them; here nothing was ever loaded so far out.
    slots = np.array([1, 9, 63, 64, 500, -1, 100_000], dtype=np.int64)
    case.slots = slots.tolist()
    case.rows = Assignment(slots, DEVICE)
    case.x = case.draw(len(slots), 64)
    case.base = [case.draw(len(slots), out) for out in (64, 16, 16)]
    case.slots = [1, *([None] * (len(slots) - 1))]
    group = backend.make_group(3)
    group.load(1, case.weights[1])
    backend.commit(DEVICE)
    shrunk = group.shrink(case.x, case.rows)
    for member, base in enumerate(case.base):
        y = base.clone()
        group.expand(shrunk, member, y, case.rows)
        case.check(y, case.expected(member))
        assert torch.equal(y[1:], base[1:])


def test_no_rows(backend: LoraBackend) -> None:
    case = Case("single", "nothing")
    case.rows = Assignment(np.zeros(0, dtype=np.int64), DEVICE)
    group = backend.make_group(1)
    group.load(0, case.weights[0])
    backend.commit(DEVICE)
    y = case.base[0][:0].clone()
    group.expand(group.shrink(case.x[:0], case.rows), 0, y, case.rows)
    assert y.shape == (0, 48)


@pytest.mark.parametrize(("width", "out", "rank"), [(48, 32, 8), (37, 5, 3)])
@pytest.mark.parametrize("num_rows", [9, 700])
def test_experts_are_loaded_together(
    backend: LoraBackend, width: int, out: int, rank: int, num_rows: int
) -> None:
    case = Case("single", "nothing")
    stacks = {
        first: ExpertsWeights(case.draw(6, (rank + first) * (width + out)), width, rank + first)
        for first in (0, 12)
    }
    numbers = torch.randint(-1, 19, (num_rows,), generator=case.generator)
    case.slots = [None if number < 0 else number for number in numbers.tolist()]
    case.x, case.base = case.draw(num_rows, width), [case.draw(num_rows, out)]
    group = backend.make_group(1)

    def check(loaded: dict[int, GroupWeights]) -> None:
        rows = backend.assign(numbers.to(DEVICE))
        y = case.base[0].clone()
        group.expand(group.shrink(case.x, rows), 0, y, rows)
        case.check(y, case.expected(0, loaded=loaded))

    for first, stack in stacks.items():
        group.load_experts(first, stack)
    backend.commit(DEVICE)
    each = {first + n: stack.of(n) for first, stack in stacks.items() for n in range(6)}
    check(each)
    group.unload_experts(0, 6)
    backend.commit(DEVICE)
    check({number: weights for number, weights in each.items() if number >= 12})


class OfStep(NamedTuple):
    """What the adapters of a step add to pairs, which are told of as they are made."""

    group: LoraGroup
    backend: LoraBackend
    slots: torch.Tensor
    per_slot: int

    def told(self, num_pairs: int) -> ToldFunction | None:
        return self.backend.told_of_pairs(num_pairs, self.per_slot)

    def of(self, pairs: Pairs) -> dict[str, FactorsOfPairs]:
        if pairs.is_told:
            return {"up": FactorsOfPairs(self.group, self.backend.told_pairs)}
        rows = self.backend.assign_pairs(pairs, self.slots, self.per_slot)
        return {"up": FactorsOfPairs(self.group, rows)}


@pytest.mark.parametrize("num_tokens", [1, 9, 300])
@pytest.mark.parametrize("kind", [CpuPairs, TorchPairs])
def test_pairs_have_the_matrices_of_their_expert_in_their_tokens_slot(
    backend: LoraBackend, kind: type[Pairs], num_tokens: int
) -> None:
    if kind is CpuPairs and (DEVICE.type != "cpu" or probe() is not None):
        pytest.skip("there is no kernel of our own here")
    case, width, out, per_slot = Case("single", "nothing"), 40, 24, 7
    slots = torch.randint(-1, 3, (num_tokens,), generator=case.generator)
    chosen = torch.rand(num_tokens, 5, generator=case.generator).argsort(1)[:, :2]
    group, each = backend.make_group(1), {}
    for slot in (0, 2):
        stack = ExpertsWeights(case.draw(5, (3 + slot) * (width + out)), width, 3 + slot)
        group.load_experts(slot * per_slot, stack)
        each |= {slot * per_slot + n: stack.of(n) for n in range(5)}
    backend.commit(DEVICE)
    pairs, of_step = kind(chosen.to(DEVICE), 5), OfStep(group, backend, slots.to(DEVICE), per_slot)
    x, weight = case.draw(num_tokens, width), case.draw(5, out, width)
    case.slots = [
        None if slots[token] < 0 else int(slots[token]) * per_slot + expert
        for expert, token in zip(pairs.experts.tolist(), pairs.tokens.tolist(), strict=True)
    ]

    # The input is the token's, then the pair's own.
    for tokens, inputs in ((pairs.tokens, x), (None, x[pairs.tokens])):
        case.x = x[pairs.tokens]
        case.base = [pairs.multiply(inputs, tokens, weight, in_first=False)]
        y = pairs.multiply(inputs, tokens, weight, of_step.of(pairs)["up"], in_first=False)
        case.check(y, case.expected(0, loaded=each))
        later = case.base[0].clone()
        of_step.of(pairs)["up"].add(inputs, tokens, later)
        torch.testing.assert_close(later, y)
        if kind is CpuPairs:
            told = CpuPairs(chosen, 5, of_step)
            add = of_step.of(told)["up"]
            assert torch.equal(told.multiply(inputs, tokens, weight, add, in_first=False), y)
