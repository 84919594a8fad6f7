"""The panel kernel, as compiled for each instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional

from lorax_shard.fused.backend import GateFunction
from lorax_shard.fused.cpp import CppElementwise
from lorax_shard.linear import panel
from lorax_shard.linear.panel import PanelBackend, PanelKernel, PanelLibrary, load_panels
from lorax_shard.native import NativeFunction, noting_calls

# Besides this processor's own: what one without these instructions computes with.
NARROWER = {"own": (), "without AVX-512": ("-mno-avx512f",), "without AVX": ("-mno-avx",)}
# Neither whole panels nor whole blocks, more rows than pass at once.
SHAPES = ((1, 1), (31, 129), (33, 300), (130, 577))
MOST_ROWS = 200


@pytest.fixture(scope="module", params=NARROWER)
def library(request: pytest.FixtureRequest) -> PanelLibrary:
    found, reason = load_panels(*NARROWER[request.param])
    if found is None:
        pytest.skip(f"{request.param}: {reason}")
    return found


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed(
    library: PanelLibrary, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> PanelKernel:
    return PanelKernel(library, weight, bias, torch.empty(panel.packed_size(library, weight)))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_computes_the_linear(
    library: PanelLibrary, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    kernel = packed(library, weight, bias)
    assert torch.equal(kernel.dense(), weight)
    for rows in (0, 1, 5, 13, 96, 97, MOST_ROWS):
        x = torch.randn(rows, shape[1])
        torch.testing.assert_close(
            kernel(x), functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5 * shape[1] ** 0.5
        )


@pytest.mark.parametrize("activation", GateFunction)
@pytest.mark.parametrize("width", [1, 32, 70, 224])
def test_a_product_gates_its_own_columns_to_the_same_bits(
    library: PanelLibrary, width: int, activation: GateFunction
) -> None:
    torch.manual_seed(0)
    num_in = 300
    kernel = packed(library, torch.randn(2 * width, num_in), torch.randn(2 * width))
    gates = CppElementwise()
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for rows in (0, 1, 5, 13, 96, 97, MOST_ROWS):
            x = torch.randn(rows, num_in)
            calls: list[tuple[NativeFunction, bytes]] = []
            with noting_calls(lambda *call, to=calls: to.append(call)):
                gate, up = kernel(x).chunk(2, dim=-1)
                expected = gates.gated(gate, up, activation)
            (linear, product), (gated, told) = calls
            out, y = torch.full_like(expected, torch.nan), torch.empty(rows, 2 * width)
            fields = [np.frombuffer(each, dtype=np.int64).copy() for each in (product, told)]
            fields[0][4] = fields[1][0] = y.data_ptr()
            fields[1][2], fields[1][4] = y.data_ptr() + 4 * width, out.data_ptr()
            address = np.array([gated.rows_address], dtype=np.int64)
            linear.joined[gated.name](np.concatenate([*fields, address]).tobytes())
            assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_to_the_bit_in_any_company_on_any_threads(
    library: PanelLibrary, shape: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    kernel = packed(library, torch.randn(shape), torch.randn(shape[0]))
    x = torch.randn(MOST_ROWS, shape[1])
    torch.set_num_threads(1)
    alone = torch.cat([kernel(x[row : row + 1]) for row in range(MOST_ROWS)])
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for rows in (1, 7, 12, 13, 64, 97, MOST_ROWS):
            first = MOST_ROWS - rows
            assert torch.equal(kernel(x[first:]), alone[first:]), (num_threads, rows)


def test_what_is_not_finite_stays_in_its_row(library: PanelLibrary) -> None:
    torch.manual_seed(2)
    kernel = packed(library, torch.randn(40, 150))
    x = torch.randn(20, 150)
    expected = kernel(x)
    x[3], x[11, 7] = float("inf"), float("nan")
    others = [row for row in range(20) if row not in (3, 11)]
    found = kernel(x)
    assert torch.equal(found[others], expected[others])
    assert not found[[3, 11]].isfinite().any()


@pytest.mark.parametrize("num_in", [576, 1536, 4096])
def test_sums_are_as_exact_as_the_plain_product(library: PanelLibrary, num_in: int) -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(256, num_in), torch.randn(64, num_in)
    exact = x.double() @ weight.double().t()
    plain = (functional.linear(x, weight) - exact).norm()
    assert (packed(library, weight)(x) - exact).norm() <= 1.25 * plain


def test_refuses_what_it_would_compute_wrongly() -> None:
    backend = PanelBackend()
    if (reason := backend.probe(torch.device("cpu"), torch.float32)) is not None:
        pytest.skip(reason)
    kernel = backend.pack(torch.randn(8, 16), None)
    with pytest.raises(ValueError, match="float64"):
        kernel(torch.randn(2, 16).double())
    with pytest.raises(ValueError, match="rows of 15 numbers for a weight of 16"):
        kernel(torch.randn(2, 15))


def test_a_processor_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "load_panels", lambda: (None, "no C++ compiler is installed"))
    probe = PanelBackend.probe
    assert probe(torch.device("cpu"), torch.float32) == "no C++ compiler is installed"


def test_weights_share_mappings_and_leave_them_when_they_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = PanelBackend()
    if (reason := backend.probe(torch.device("cpu"), torch.float32)) is not None:
        pytest.skip(reason)
    weight = torch.randn(64, 64)
    sizes: list[int] = []

    def map_memory(size: int) -> torch.Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(panel, "map_memory", map_memory)
    monkeypatch.setattr(panel, "_MAPPING_BYTES", 2 * weight.nbytes)
    for _ in range(3):  # packed to be measured, then given up
        kernels = [backend.pack(weight, None) for _ in range(2)]
        assert all(torch.equal(kernel.dense(), weight) for kernel in kernels)
        del kernels
    assert sizes == [2 * weight.nbytes]
    kept = [backend.pack(weight + i, None) for i in range(3)]
    kept.append(backend.pack(torch.randn(512, 64), None))
    assert sizes == [2 * weight.nbytes] * 2 + [8 * weight.nbytes]
    assert all(torch.equal(kept[i].dense(), weight + i) for i in range(3))
