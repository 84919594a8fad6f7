"""Every elementwise backend computes what the specification says, whatever lies around a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.helpers.paged_sequences import DEVICE

from lorax_contract.errors import StartupError
from lorax_shard.fused.backend import (
    ElementwiseBackend,
    EncoderElementwise,
    GateFunction,
    LayerNorm,
    RmsNorm,
    Rotation,
    UnaryFunction,
    WeightedNorm,
)
from lorax_shard.fused.reference import TorchElementwise
from lorax_shard.fused.registry import BACKENDS

# Triton's interpreter computes in numpy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

SPECIFICATION = TorchElementwise()
WIDTHS = (1, 7, 8, 64, 129, 576)
LEADING = ((1,), (1, 3), (2, 2, 3), (0,), (1, 0))
ROTATIONS = [
    *(Rotation(adjacent, by_pair) for adjacent in (False, True) for by_pair in (False, True)),
    *(Rotation(adjacent, True, is_short=True) for adjacent in (False, True)),
]


@pytest.fixture(params=BACKENDS.names)
def backend(request: pytest.FixtureRequest) -> ElementwiseBackend:
    try:
        return BACKENDS.create(request.param, DEVICE, torch.float32)
    except StartupError as error:
        pytest.skip(str(error))


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6, equal_nan=True)


def layouts(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield equal tensors whose numbers lie elsewhere."""
    yield x
    *leading, width = x.shape
    columns = x.new_zeros(*leading, 2 * width + 3)
    columns[..., 1 : width + 1] = x
    yield columns[..., 1 : width + 1]
    spread = x.new_zeros(*leading, width, 2)
    spread[..., 0] = x
    yield spread[..., 0]
    if len(leading) > 1:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm(backend: ElementwiseBackend, width: int, offset: float) -> None:
    norm, weight = RmsNorm(1e-5, offset), draw(width, seed=1)
    for leading in LEADING:
        for x in layouts(draw(*leading, width) + 0.5):
            before = x.clone()
            close(backend.rms_norm(x, weight, norm), SPECIFICATION.rms_norm(x, weight, norm))
            assert torch.equal(x, before)


def norms_of(width: int, dtype: torch.dtype = torch.float32) -> list[WeightedNorm]:
    """Two norms that differ in all that a norm has."""
    forms = RmsNorm(1e-5, 1.0, rounds_first=True), RmsNorm(1e-2, 0.0)
    weights = (draw(width, seed=seed).to(dtype) for seed in (3, 4))
    return [WeightedNorm(*each) for each in zip(forms, weights, strict=True)]


@pytest.mark.parametrize("num_inner", [0, 1])
@pytest.mark.parametrize("num_outer", [0, 1])
@pytest.mark.parametrize("width", WIDTHS)
def test_sum_and_its_norms_are_what_they_are_apart(
    backend: ElementwiseBackend, width: int, num_inner: int, num_outer: int
) -> None:
    both = norms_of(width)
    inner, outer = both[0] if num_inner else None, both[1] if num_outer else None
    for leading in LEADING:
        for x, delta in zip(*(layouts(draw(*leading, width, seed=s)) for s in (0, 1)), strict=True):
            before = x.clone(), delta.clone()
            total, normed = backend.add_norms(x, delta, inner, outer)
            step = delta if inner is None else backend.rms_norm(delta, inner.weight, inner.norm)
            if DEVICE.type == "cpu":
                assert torch.equal(total, x + step)
            # A GPU may multiply and add in one.
            close(total, x + step)
            if outer is None:
                assert normed is None
            else:
                assert normed is not None
                assert torch.equal(normed, backend.rms_norm(total, outer.weight, outer.norm))
            assert torch.equal(x, before[0])
            assert torch.equal(delta, before[1])


@pytest.mark.parametrize("activation", GateFunction)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated(backend: ElementwiseBackend, width: int, activation: GateFunction) -> None:
    for leading in LEADING:
        gates, ups = (layouts(3 * draw(*leading, width, seed=seed)) for seed in (0, 1))
        for gate, up in zip(gates, ups, strict=True):
            close(backend.gated(gate, up, activation), SPECIFICATION.gated(gate, up, activation))


@pytest.mark.parametrize("activation", GateFunction)
def test_gated_from_one_end_to_the_other(
    backend: ElementwiseBackend, activation: GateFunction
) -> None:
    gate = torch.cat([torch.linspace(-120, 120, 4001), torch.logspace(-30, 30, 61)]).to(DEVICE)
    close(
        backend.gated(gate, torch.ones_like(gate), activation),
        SPECIFICATION.gated(gate, torch.ones_like(gate), activation),
    )


@pytest.fixture
def encoders_backend(backend: ElementwiseBackend) -> EncoderElementwise:
    if not isinstance(backend, EncoderElementwise):
        pytest.skip("it computes decoders alone")
    return backend


@pytest.mark.parametrize("activation", UnaryFunction)
@pytest.mark.parametrize("width", WIDTHS)
def test_activation(
    encoders_backend: EncoderElementwise, width: int, activation: UnaryFunction
) -> None:
    for leading in LEADING:
        for x in layouts(3 * draw(*leading, width)):
            before = x.clone()
            found = encoders_backend.activated(x, activation)
            close(found, SPECIFICATION.activated(x, activation))
            assert torch.equal(x, before)
            assert torch.equal(encoders_backend.activated(x, activation, in_place=True), found)


@pytest.mark.parametrize("activation", UnaryFunction)
def test_activation_from_one_end_to_the_other(
    encoders_backend: EncoderElementwise, activation: UnaryFunction
) -> None:
    ends = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.logspace(-30, 30, 61)]).to(DEVICE)
    close(encoders_backend.activated(x, activation), SPECIFICATION.activated(x, activation))
    found = encoders_backend.activated(ends, activation)
    assert not found[:3].isfinite().any()
    assert found[3] == 0


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("width", [2, *WIDTHS[1:]])
def test_norm_of_rows(
    encoders_backend: EncoderElementwise, width: int, has_delta: bool, has_bias: bool
) -> None:
    bias = draw(width, seed=3) if has_bias else None
    norm = LayerNorm(draw(width, seed=2), bias, 1e-5)
    for leading in LEADING:
        for x, other in zip(
            *(layouts(draw(*leading, width, seed=seed) + 0.5) for seed in (0, 1)), strict=True
        ):
            before, delta = (x.clone(), other.clone()), other if has_delta else None
            found = encoders_backend.layer_norm(x, delta, norm)
            expected = SPECIFICATION.layer_norm(x, delta, norm)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(x, before[0])
            assert torch.equal(other, before[1])


def test_rows_of_an_encoder_are_the_same_alone_and_on_any_threads(
    encoders_backend: EncoderElementwise,
) -> None:
    if isinstance(encoders_backend, TorchElementwise):
        pytest.skip("torch does not promise it")
    rows, width = 900, 577
    x, delta, norm = (
        draw(rows, width),
        draw(rows, width, seed=1),
        LayerNorm(draw(width), None, 1e-5),
    )

    def compute(first: int, last: int) -> list[torch.Tensor]:
        at = slice(first, last)
        activated = [encoders_backend.activated(x[at], each) for each in UnaryFunction]
        return [*activated, encoders_backend.layer_norm(x[at], delta[at], norm)]

    with num_threads(1):
        together = compute(0, rows)
    with num_threads(3):
        for found, expected in zip(compute(0, rows), together, strict=True):
            assert torch.equal(found, expected)
    for first, last in ((0, 1), (13, 14), (5, 8), (rows - 1, rows)):
        for found, expected in zip(compute(first, last), together, strict=True):
            assert torch.equal(found, expected[first:last])


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("dim", "width"), [(2, 2), (64, 64), (20, 6)])
@pytest.mark.parametrize(("heads", "tokens"), [((1, 1), 1), ((3, 1), 5), ((2, 2), 0)])
def test_rotation(
    backend: ElementwiseBackend,
    rotation: Rotation,
    dim: int,
    width: int,
    heads: tuple[int, int],
    tokens: int,
) -> None:
    num_cosines = width // 2 if rotation.is_short else width
    cos, sin = draw(2, 1, tokens, num_cosines, seed=2)
    shapes = [(1, number, tokens, dim) for number in heads]
    queries, keys = (layouts(draw(*shape, seed=seed)) for seed, shape in enumerate(shapes))
    for query, key in zip(queries, keys, strict=True):
        found = backend.rotate(query, key, cos, sin, rotation)
        expected = SPECIFICATION.rotate(query, key, cos, sin, rotation)
        close(found[0], expected[0])
        close(found[1], expected[1])
        if backend.name == "cpp":
            # Products and sums are rounded as torch rounds them.
            assert torch.equal(found[0], expected[0])


def test_rotation_of_columns_of_one_tensor(backend: ElementwiseBackend) -> None:
    stacked = draw(1, 6, 5 * 16)
    query = stacked[..., : 3 * 16].view(1, 6, 3, 16).transpose(1, 2)
    key = stacked[..., 3 * 16 : 4 * 16].view(1, 6, 1, 16).transpose(1, 2)
    cos, sin = draw(2, 1, 6, 16, seed=2)
    rotation = Rotation(is_adjacent=False, is_by_pair=False)
    found = backend.rotate(query, key, cos, sin, rotation)
    expected = SPECIFICATION.rotate(query.clone(), key.clone(), cos, sin, rotation)
    close(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_passes_through_and_stays_in_its_row(
    backend: ElementwiseBackend, strange: float
) -> None:
    x = draw(3, 33)
    x[1, 20] = strange
    norm = RmsNorm(1e-6, 0.0)
    close(
        backend.rms_norm(x, torch.ones(33, device=DEVICE), norm),
        SPECIFICATION.rms_norm(x, torch.ones(33, device=DEVICE), norm),
    )
    for activation in GateFunction:
        for gate, up in ((x, draw(3, 33, seed=1)), (draw(3, 33, seed=1), x)):
            close(backend.gated(gate, up, activation), SPECIFICATION.gated(gate, up, activation))
    heads, angles = x[:, :32].view(1, 1, 3, 32), draw(1, 3, 32, seed=3)
    for rotation in ROTATIONS[:4]:
        found = backend.rotate(heads, heads, angles, angles, rotation)[0]
        close(found, SPECIFICATION.rotate(heads, heads, angles, angles, rotation)[0])


def test_a_row_is_the_same_alone_and_among_others_on_any_threads(
    backend: ElementwiseBackend,
) -> None:
    if backend.name == "torch":
        pytest.skip("torch does not promise it: a thread's last numbers differ")
    # An interpreter takes one row after the other.
    rows, width = (700, 577) if backend.name == "cpp" else (24, 33)
    x, up, weight = draw(rows, width), draw(rows, width, seed=1), draw(width, seed=2)
    heads, angles = draw(1, 3, rows, 64, seed=3), draw(2, 1, rows, 64, seed=4)

    def compute(first: int, last: int) -> list[torch.Tensor]:
        at = slice(first, last)
        turned = backend.rotate(
            heads[:, :, at], heads[:, :, at], *angles[:, :, at], Rotation(False, False)
        )
        return [
            backend.rms_norm(x[at], weight, RmsNorm(1e-5, 0.0)),
            *backend.add_norms(x[at], up[at], *norms_of(width)),
            *(backend.gated(x[at], up[at], activation) for activation in GateFunction),
            *(each[0].transpose(0, 1) for each in turned),
        ]

    with num_threads(1):
        together = compute(0, rows)
    with num_threads(3):
        for found, expected in zip(compute(0, rows), together, strict=True):
            assert torch.equal(found, expected)
    for first, last in ((0, 1), (13, 14), (5, 8), (20, rows - 2), (rows - 1, rows)):
        for found, expected in zip(compute(first, last), together, strict=True):
            assert torch.equal(found, expected[first:last])


def test_a_row_is_the_same_wherever_it_lies(backend: ElementwiseBackend) -> None:
    if backend.name == "torch":
        pytest.skip("torch does not promise it")
    memory, row, weight = torch.zeros(700, device=DEVICE), draw(576), draw(576, seed=1)
    expected = backend.rms_norm(row, weight, RmsNorm(1e-5, 0.0))
    gated = backend.gated(row, row, GateFunction.SILU)
    for start in range(33):
        memory[start : start + 576] = row
        moved = memory[start : start + 576]
        assert torch.equal(backend.rms_norm(moved, weight, RmsNorm(1e-5, 0.0)), expected)
        assert torch.equal(backend.gated(moved, moved, GateFunction.SILU), gated)


@pytest.mark.parametrize(
    "call",
    [
        lambda b: b.rms_norm(torch.ones(2, 8).double(), torch.ones(8), RmsNorm(1e-5, 0.0)),
        lambda b: b.rms_norm(torch.ones(2, 8), torch.ones(7), RmsNorm(1e-5, 0.0)),
        lambda b: b.gated(torch.ones(2, 8), torch.ones(3, 8), GateFunction.SILU),
        lambda b: b.activated(torch.ones(2, 8).double(), UnaryFunction.GELU),
        lambda b: b.layer_norm(torch.ones(2, 8), None, LayerNorm(torch.ones(7), None, 1e-5)),
        lambda b: b.layer_norm(
            torch.ones(2, 8), torch.ones(3, 8), LayerNorm(torch.ones(8), None, 1e-5)
        ),
        lambda b: b.rotate(*_heads(tokens=3), Rotation(False, False)),
        lambda b: b.rotate(*_heads(width=32), Rotation(False, False)),
        lambda b: b.rotate(*_heads(key_dim=8), Rotation(False, False)),
    ],
)
def test_kernels_read_nothing_that_does_not_fit(backend: ElementwiseBackend, call) -> None:
    if backend.name != "cpp":
        pytest.skip("it has checks of its own")
    with pytest.raises(ValueError):
        call(backend)


def _heads(*, tokens: int = 2, width: int = 16, key_dim: int = 16) -> list[torch.Tensor]:
    angles = torch.ones(1, tokens, width)
    return [torch.ones(1, 3, 2, 16), torch.ones(1, 1, 2, key_dim), angles, angles]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKENDS.names)
def test_16_bits_are_rounded_where_the_specification_rounds(name: str, dtype: torch.dtype) -> None:
    try:
        backend = BACKENDS.create(name, DEVICE, dtype)
    except StartupError as error:
        pytest.skip(str(error))

    def near(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.dtype is dtype
        difference = (found.float() - expected.float()).abs() / expected.float().abs().clamp(min=1)
        if dtype is torch.bfloat16:
            # Which Triton's interpreter cuts off, each time.
            assert float(difference.max()) <= 3 * torch.finfo(dtype).eps
            return
        # A unit in the last place, here and there.
        assert float(difference.max()) <= torch.finfo(dtype).eps
        assert float((difference > 0).float().mean()) < 0.01

    x, up, weight = (draw(*shape, seed=seed).to(dtype) for seed, shape in enumerate(
        [(9, 96), (9, 96), (96,)]
    ))  # fmt: skip
    for offset in (0.0, 1.0):
        for rounds_first in (False, True):
            norm = RmsNorm(1e-5, offset, rounds_first)
            near(backend.rms_norm(x, weight, norm), SPECIFICATION.rms_norm(x, weight, norm))
    inner, outer = norms_of(96, dtype)
    total, normed = backend.add_norms(x, up, inner, outer)
    assert normed is not None
    if dtype is torch.float16:
        # Both are rounded where they are apart.
        assert torch.equal(total, x + backend.rms_norm(up, inner.weight, inner.norm))
        assert torch.equal(normed, backend.rms_norm(total, outer.weight, outer.norm))
        near(total, SPECIFICATION.add_norms(x, up, inner, None)[0])
    near(backend.add_norms(x, up, None, outer)[0], x + up)
    for activation in GateFunction:
        near(backend.gated(x, up, activation), SPECIFICATION.gated(x, up, activation))
    heads, angles = x.view(1, 3, 9, 32), up.view(3, 1, 9, 32)[:2]
    for rotation in ROTATIONS[:4]:
        found = backend.rotate(heads, heads[:, :1], *angles, rotation)
        expected = SPECIFICATION.rotate(heads, heads[:, :1], *angles, rotation)
        near(found[0], expected[0])
        near(found[1], expected[1])
