"""Many rows on matrix tiles: float32 out of bfloat16 products, on a processor that has tiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from lorax_shard.linear.panel import PanelKernel, PanelLibrary, load_panels, packed_size
from lorax_shard.linear.registry import BACKENDS
from lorax_shard.linear.replace import _unrivalled

CPU = torch.device("cpu")
# The fewest rows that tiles take.
FEWEST = 65


@pytest.fixture(scope="module")
def library() -> PanelLibrary:
    if (reason := BACKENDS.probe("tiles", CPU, torch.float32)) is not None:
        pytest.skip(reason)
    found, _ = load_panels()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed(
    library: PanelLibrary,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    on_tiles: bool = True,
) -> PanelKernel:
    memory = torch.empty(packed_size(library, weight))
    return PanelKernel(library, weight, bias, memory, on_tiles=on_tiles)


# Neither whole tiles, nor whole panels, blocks or stretches of inputs.
@pytest.mark.parametrize("shape", [(1, 1), (17, 31), (31, 129), (130, 577), (96, 768), (70, 1701)])
@pytest.mark.parametrize("rows", [FEWEST, 80, 97, 256, 300, 530])
def test_computes_as_exactly_as_the_plain_product(
    library: PanelLibrary, shape: tuple[int, int], rows: int
) -> None:
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(rows, shape[1])
    exact = functional.linear(x.double(), weight.double(), bias.double())
    plain = (functional.linear(x, weight, bias) - exact).norm()
    assert (packed(library, weight, bias)(x) - exact).norm() <= 1.25 * plain + 1e-6


def test_a_product_is_a_float32_whatever_its_size(library: PanelLibrary) -> None:
    torch.manual_seed(1)
    num = 160
    x = torch.diag(torch.randn(num) * 10.0 ** torch.linspace(-18, 18, num))
    weight = torch.randn(40, num) * 10.0 ** torch.randint(-12, 12, (40, num))
    exact = x.double() @ weight.double().t()
    assert ((packed(library, weight)(x) - exact) / exact).abs().max() < 2.0**-21


def test_among_many_a_row_is_the_same_to_the_bit(library: PanelLibrary) -> None:
    torch.manual_seed(2)
    kernel, x = packed(library, torch.randn(130, 900)), torch.randn(600, 900)
    torch.set_num_threads(1)
    first = kernel(x)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for rows in (FEWEST, 96, 257, 600):
            assert torch.equal(kernel(x[-rows:]), first[-rows:]), (num_threads, rows)


def test_few_rows_are_those_of_panels(library: PanelLibrary) -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(70, 300), torch.randn(FEWEST - 1, 300)
    alone = packed(library, weight, on_tiles=False)
    assert torch.equal(packed(library, weight)(x), alone(x))


def test_what_is_not_finite_stays_in_its_row(library: PanelLibrary) -> None:
    torch.manual_seed(4)
    kernel, x = packed(library, torch.randn(40, 150)), torch.randn(100, 150)
    expected = kernel(x)
    x[3], x[70, 7] = float("inf"), float("nan")
    others = [row for row in range(100) if row not in (3, 70)]
    found = kernel(x)
    assert torch.equal(found[others], expected[others])
    assert not found[3].isfinite().any()
    assert not found[70].isfinite().any()


def test_rows_may_lie_apart(library: PanelLibrary) -> None:
    torch.manual_seed(5)
    kernel, wide = packed(library, torch.randn(64, 200)), torch.randn(100, 450)
    part = wide[:, 37:237]
    assert torch.equal(kernel(part), kernel(part.contiguous()))


def test_panels_are_not_measured_beside_what_is_panels_and_more() -> None:
    backends = [BACKENDS.load(name)() for name in ("tiles", "panel", "torch")]
    assert [each.name for each in _unrivalled(backends)] == ["tiles", "torch"]
    assert [each.name for each in _unrivalled(backends[1:])] == ["panel", "torch"]
