"""The kernel for experts on a CPU computes what torch's grouped product does, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_shard.mixture.pairs import CpuPairs, Pairs, TorchPairs, can_be_native, probe, route
from lorax_shard.numbers import TYPES

pytestmark = pytest.mark.skipif(probe() is not None, reason=str(probe()))

# Inputs and outputs: multiples of nothing, of a register, more than a piece of a matrix.
WIDTHS = ((1, 1), (7, 5), (16, 4), (33, 65), (64, 300), (130, 128), (1100, 133))


def choose(num_tokens: int, k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    return scores.topk(k, dim=1).indices


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plainly(
    pairs: Pairs, rows: torch.Tensor, weight: torch.Tensor, *, in_first: bool
) -> torch.Tensor:
    """Multiply pair by pair, in double precision."""
    matrices = (weight if in_first else weight.mT).double()
    found = [row.double() @ matrices[e] for row, e in zip(rows, pairs.experts, strict=True)]
    return torch.stack(found).float() if found else torch.empty(0, matrices.shape[2])


@pytest.fixture(params=[1, 2, 3], ids=lambda number: f"{number} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@given(st.integers(0, 40), st.integers(1, 6), st.integers(6, 20), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_pairs_are_sorted_by_expert_and_within_it_by_token(
    num_tokens: int, k: int, num_experts: int, seed: int
) -> None:
    chosen = choose(num_tokens, k, num_experts, seed)
    ours, theirs = CpuPairs(chosen, num_experts), TorchPairs(chosen, num_experts)
    assert torch.equal(ours.experts, theirs.experts)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.ends, theirs.ends.long())


@given(st.integers(0, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_pairs_have_the_numbers_of_their_slots(num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, 4, (num_tokens,), generator=generator)
    chosen = choose(num_tokens, 3, 8, seed)
    ours, theirs = CpuPairs(chosen, 8), TorchPairs(chosen, 8)
    expected = [
        -1 if slots[token] < 0 else int(slots[token] * 11 + expert)
        for expert, token in zip(ours.experts, ours.tokens, strict=True)
    ]
    assert ours.numbers(slots, 11).tolist() == expected
    assert theirs.numbers(slots, 11).tolist() == expected


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("in_first", [False, True])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 40, 300])
def test_products_are_those_of_each_pair_alone(
    widths: tuple[int, int], num_tokens: int, dtype: torch.dtype, *, in_first: bool
) -> None:
    num_in, num_out = widths
    x = draw(num_tokens, num_in)
    weight = draw(9, *(widths if in_first else widths[::-1]), seed=2).to(dtype)
    pairs = CpuPairs(choose(num_tokens, 2, 9), 9)
    expected = plainly(pairs, x[pairs.tokens], weight, in_first=in_first)
    bound = {"atol": 2e-5 * max(1.0, num_in**0.5), "rtol": 1e-5}
    torch.testing.assert_close(
        pairs.multiply(x, pairs.tokens, weight, in_first=in_first), expected, **bound
    )
    own = draw(2 * num_tokens, num_in, seed=3)
    expected = plainly(pairs, own, weight, in_first=in_first)
    found = pairs.multiply(own, None, weight, in_first=in_first)
    assert found.shape == (2 * num_tokens, num_out)
    torch.testing.assert_close(found, expected, **bound)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("in_first", [False, True])
def test_a_pair_gets_the_same_bits_whatever_comes_beside_it(*, in_first: bool) -> None:
    num_tokens, x, weight = 150, draw(150, 200), draw(5, 200, 200, seed=2)
    chosen = choose(num_tokens, 2, 5)
    together = CpuPairs(chosen, 5)
    y = together.multiply(x, together.tokens, weight, in_first=in_first)
    combined = together.combine(y, torch.ones(chosen.shape))
    for first, last in itertools.pairwise((0, 1, 3, 6, 10, 50, num_tokens)):
        some = CpuPairs(chosen[first:last], 5)
        alone = some.multiply(x[first:last], some.tokens, weight, in_first=in_first)
        alone = some.combine(alone, torch.ones(last - first, 2))
        assert torch.equal(alone, combined[first:last])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_tokens", [0, 1, 30, 300])
def test_what_pairs_made_is_summed_by_token(num_tokens: int) -> None:
    chosen, weights = choose(num_tokens, 3, 8), draw(num_tokens, 3, seed=5)
    y = draw(3 * num_tokens, 77)
    ours, theirs = CpuPairs(chosen, 8), TorchPairs(chosen, 8)
    torch.testing.assert_close(ours.combine(y, weights), theirs.combine(y, weights))


def test_rows_may_lie_anywhere() -> None:
    weight, pairs = draw(4, 6, 10, seed=2), CpuPairs(choose(8, 2, 4), 4)
    wide = draw(8, 25)
    for x in (wide[:, 3:13], draw(10, 8).mT, wide[::1, ::2][:, :10]):
        expected = plainly(pairs, x[pairs.tokens], weight, in_first=False)
        torch.testing.assert_close(
            pairs.multiply(x, pairs.tokens, weight, in_first=False), expected
        )


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3, 3, dtype=torch.bfloat16)),
        (torch.ones(2, 3), torch.ones(4, 3, 3, dtype=torch.float64)),
        (torch.ones(2, 3), torch.ones(4, 3, 5)[:, :, :3]),
        (torch.ones(2, 3, device="meta"), torch.ones(4, 3, 3)),
    ],
    ids=["16 bits", "weights of 64 bits", "weights in parts", "elsewhere"],
)
def test_other_numbers_are_left_to_torch(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert not can_be_native(*tensors)


def test_the_kernel_is_taken_where_it_can_be() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3, 3)
    assert isinstance(route(choose(2, 1, 4), x, weight), CpuPairs)
    assert isinstance(route(choose(2, 1, 4), x, weight.bfloat16(), weight), CpuPairs)
    assert isinstance(route(choose(2, 1, 4), x.bfloat16(), weight.bfloat16()), TorchPairs)


@pytest.mark.parametrize("in_first", [False, True])
def test_matrices_of_16_bits_change_no_bit(*, in_first: bool) -> None:
    x, pairs = draw(70, 48), CpuPairs(choose(70, 2, 4), 4)
    for dtype in TYPES:
        weight = draw(4, 48, 48, seed=2).to(dtype)
        narrow = pairs.multiply(x, pairs.tokens, weight, in_first=in_first)
        assert torch.equal(
            narrow, pairs.multiply(x, pairs.tokens, weight.float(), in_first=in_first)
        )
        theirs = TorchPairs(choose(70, 2, 4), 4).multiply(
            x, pairs.tokens, weight, in_first=in_first
        )
        torch.testing.assert_close(narrow, theirs, atol=1e-4, rtol=1e-4)
