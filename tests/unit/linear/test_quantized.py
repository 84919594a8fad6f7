"""The kernel of quantized weights, as compiled for each instruction set that this processor has."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tests.helpers.quantized_weights import FORMATS, random_weight
from torch import nn
from torch.nn import functional

from lorax_shard.linear.packed import PackedLinear, SiblingKernel
from lorax_shard.linear.quantized import packing
from lorax_shard.linear.quantized.formats import Format, QuantizedWeight, to_int8
from lorax_shard.linear.quantized.install import install_quantized, quantize
from lorax_shard.linear.quantized.kernel import (
    QuantizedKernel,
    QuantizedLibrary,
    load_quantized,
)

NARROWER = {
    "own": (),
    "without VNNI": ("-mno-avx512vnni",),
    "without AVX-512": ("-mno-avx512f",),
    "without AVX": ("-mno-avx",),
}
# Neither whole panels nor whole blocks.
SHAPES = ((1, 32), (31, 160), (130, 576), (40, 1600))
MOST_ROWS = 200


@pytest.fixture(scope="module", params=NARROWER)
def library(request: pytest.FixtureRequest) -> QuantizedLibrary:
    found, reason = load_quantized(*NARROWER[request.param])
    if found is None:
        pytest.skip(f"{request.param}: {reason}")
    return found


@pytest.fixture(params=FORMATS, ids=lambda format_: format_.name)
def format_(request: pytest.FixtureRequest) -> Format:
    chosen: Format = request.param
    return chosen


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed(
    library: QuantizedLibrary, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> QuantizedKernel:
    size = packing.packed_bytes(weight.format, weight.codes.shape, library.columns)
    return QuantizedKernel(library, weight, bias, torch.empty(size, dtype=torch.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_the_product_of_its_own_dequantized_weight(
    library: QuantizedLibrary, format_: Format, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weight, bias = random_weight(format_, *shape), torch.randn(shape[0])
    kernel = packed(library, weight, bias)
    dense = weight.dense()
    assert torch.equal(kernel.dense(), dense)
    for rows in (0, 1, 2, 5, 12, 13, 96, 97, MOST_ROWS):
        x = torch.randn(rows, shape[1])
        scale = dense.abs().max().item() * shape[1] ** 0.5
        torch.testing.assert_close(
            kernel(x), functional.linear(x, dense, bias), rtol=1e-5, atol=2e-6 * scale
        )


def test_a_row_is_the_same_to_the_bit_in_any_company_on_any_threads(
    library: QuantizedLibrary, format_: Format
) -> None:
    torch.manual_seed(1)
    kernel = packed(library, random_weight(format_, 130, 576), torch.randn(130))
    x = torch.randn(MOST_ROWS, 576)
    torch.set_num_threads(1)
    together = kernel(x)
    alone = torch.cat([kernel(row) for row in x.split(1)])
    # Matrix tiles round otherwise than registers do: both are the same wherever they are used.
    few = library.tiles_from(format_.index)
    for first, last in ((0, 1), (3, 8), (7, 19), (20, 33), (100, 197)):
        expected = alone if last - first < few else together
        assert torch.equal(kernel(x[first:last]), expected[first:last])
    if few > MOST_ROWS:
        assert torch.equal(alone, together)
    torch.set_num_threads(3)
    assert torch.equal(kernel(x), together)


@pytest.mark.parametrize("num_in", [1, 15, 17, 31, 77, 141, 785])
def test_formats_without_groups_take_any_number_of_inputs(
    library: QuantizedLibrary, num_in: int
) -> None:
    torch.manual_seed(2)
    for format_ in FORMATS:
        if format_.group_size > 1:
            continue
        weight = random_weight(format_, 37, num_in)
        kernel, dense, x = packed(library, weight), weight.dense(), torch.randn(20, num_in)
        scale = dense.abs().max().item() * num_in**0.5
        expected = functional.linear(x.double(), dense.double()).float()
        torch.testing.assert_close(kernel(x), expected, rtol=1e-5, atol=2e-6 * scale)


def test_many_rows_are_as_exact_as_the_plain_product(
    library: QuantizedLibrary, format_: Format
) -> None:
    torch.manual_seed(3)
    weight, x = random_weight(format_, 130, 1600), torch.randn(150, 1600)
    dense = weight.dense()
    exact = x.double() @ dense.double().t()
    plain = (functional.linear(x, dense) - exact).norm()
    # Codes of four bits are multiplied as 16 and more, which costs some of the last bits.
    assert (packed(library, weight)(x) - exact).norm() <= 1.5 * plain


@pytest.mark.parametrize("factor", [0.0, 1e-42, 1e-36, 1e-20, 1.0, 1e20, 1e30])
def test_rows_of_any_size_are_as_exact(
    library: QuantizedLibrary, format_: Format, factor: float
) -> None:
    torch.manual_seed(4)
    weight, x = random_weight(format_, 40, 320), torch.randn(9, 320)
    # Some inputs are far larger than those beside them, as in models.
    x[:, ::37] *= 200
    x[0, :128] = 0
    x *= factor
    dense = weight.dense()
    exact = x.double() @ dense.double().t()
    largest = (x.double().abs() @ dense.double().abs().t()).amax()
    # What is near the smallest of numbers may count as none.
    assert (packed(library, weight)(x) - exact).abs().max() <= 1e-6 * largest + 1e-28


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_row_with_no_number_harms_no_other(
    library: QuantizedLibrary, format_: Format, bad: float
) -> None:
    torch.manual_seed(5)
    kernel, x = packed(library, random_weight(format_, 40, 320)), torch.randn(7, 320)
    expected = kernel(x)
    x[3, 17] = bad
    found = kernel(x)
    assert not found[3].isfinite().any()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(found[others], expected[others])


def test_inputs_may_lie_anyhow(library: QuantizedLibrary, format_: Format) -> None:
    weight = random_weight(format_, 24, 64)
    kernel, dense = packed(library, weight), weight.dense()
    wide = torch.randn(6, 128)
    scale = dense.abs().max().item()
    for x in (torch.randn(2, 3, 64), torch.randn(1, 0, 64), wide[:, ::2], wide[:, 64:]):
        torch.testing.assert_close(
            kernel(x), functional.linear(x, dense), rtol=1e-5, atol=2e-5 * scale
        )


def test_what_it_does_not_compute_is_refused(library: QuantizedLibrary, format_: Format) -> None:
    kernel = packed(library, random_weight(format_, 24, 64))
    with pytest.raises(ValueError, match="float32"):
        kernel(torch.randn(1, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="a weight of 64"):
        kernel(torch.randn(1, 32))


@pytest.mark.parametrize("shape", [(5, 3), (49, 130), (33, 1)])
def test_int8_takes_weights_of_any_size(library: QuantizedLibrary, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    weight[2] = 0
    made = to_int8(weight)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((made.dense() - weight).abs() <= 0.51 * step).all()
    kernel = packed(library, made)
    assert torch.equal(kernel.dense(), made.dense())
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(kernel(x), functional.linear(x, made.dense()), rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 16, bias=False)
        self.o_proj = nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.q_proj(x), self.k_proj(x)
        return torch.tanh(self.o_proj(torch.cat((q, k), dim=-1)))


class Model(nn.Module):
    """A head tied to the embedding over a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(40, 32), Block()
        self.lm_head = nn.Linear(32, 40, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.block(self.embedding(ids)))


@torch.inference_mode()
def test_a_quantized_model_computes_what_its_dequantized_weights_do() -> None:
    torch.manual_seed(2)
    model = Model().eval()
    original = copy.deepcopy(model)
    weights = quantize(model, to_int8)
    ids = torch.randint(0, 40, (7,))
    expected = model(ids)
    assert not torch.allclose(original(ids), expected, rtol=1e-5, atol=1e-5)
    plain = sum(each.nbytes for each in model.parameters())
    assert model.lm_head.weight is model.embedding.weight
    added = install_quantized(model, weights)
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    kinds = {name: type(each) for name, each in model.named_modules()}
    assert nn.Linear not in kinds.values()
    assert isinstance(model.block.q_proj, PackedLinear)
    assert isinstance(model.block.q_proj.kernel, SiblingKernel)
    # The embedding keeps its plain weight; all others shrink to a quarter and their scales.
    assert added < -0.5 * (plain - 2 * model.embedding.weight.nbytes)
