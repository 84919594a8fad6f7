"""Every linear backend computes what torch.nn.functional.linear computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lorax_shard.linear.backends import MKL_ROWS, CompositeBackend, OneDnnBackend, TorchBackend
from lorax_shard.linear.interface import LinearBackend
from lorax_shard.linear.registry import BACKENDS

CPU = torch.device("cpu")
ROWS = (0, 1, 2, 5, 8, MKL_ROWS - 1, MKL_ROWS, MKL_ROWS + 1, 97)
SHAPES = ((1, 7), (5, 3), (48, 48), (192, 64), (49, 130), (64, 192), (33, 300))


def _composite() -> LinearBackend:
    return CompositeBackend((1, 16), (TorchBackend(), OneDnnBackend(), TorchBackend()))


@pytest.fixture(params=[*BACKENDS.names, "composite"])
def backend(request: pytest.FixtureRequest) -> LinearBackend:
    if request.param == "composite":
        return _composite()
    if (reason := BACKENDS.probe(request.param, CPU, torch.float32)) is not None:
        pytest.skip(f"{request.param}: {reason}")
    return BACKENDS.create(request.param, CPU, torch.float32)


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(scale, 1e-6))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_plain_linear_for_any_row_count(
    backend: LinearBackend, shape: tuple[int, int], with_bias: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    bias = torch.randn(shape[0]) if with_bias else None
    kernel = backend.pack(weight.clone(), bias)
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        _close(kernel(x), functional.linear(x, weight, bias))


def test_takes_inputs_of_any_layout(backend: LinearBackend) -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(24, 40), torch.randn(24)
    kernel = backend.pack(weight.clone(), bias)
    wide = torch.randn(6, 80)
    inputs = [
        torch.randn(2, 3, 40),
        torch.randn(1, 0, 40),
        wide[:, ::2],
        wide[:, 40:],
        torch.randn(40, 6).t(),
    ]
    for x in inputs:
        _close(kernel(x), functional.linear(x, weight, bias))


def test_takes_a_transposed_weight(backend: LinearBackend) -> None:
    stored = torch.randn(40, 24)
    kernel = backend.pack(stored.t(), None)
    x = torch.randn(9, 40)
    _close(kernel(x), x @ stored)


def test_gives_the_weight_back_exactly(backend: LinearBackend) -> None:
    weight = torch.randn(49, 130)
    assert torch.equal(backend.pack(weight.clone(), None).dense(), weight)


def test_counts_its_bytes(backend: LinearBackend) -> None:
    weight = torch.randn(256, 256)
    nbytes = backend.pack(weight.clone(), None).nbytes
    assert nbytes >= weight.nbytes
    # A backend that gives the plain weight up holds about as much as it took.
    assert backend.keeps_plain or nbytes < 1.5 * weight.nbytes


def test_says_in_words_why_it_cannot_run() -> None:
    cuda = torch.device("cuda")
    assert BACKENDS.probe("torch", cuda, torch.float16) is None
    assert "CPU" in str(BACKENDS.probe("onednn", cuda, torch.float32))
    assert "CPU" in str(BACKENDS.probe("mkl", cuda, torch.float32))
    assert "CPU" in str(BACKENDS.probe("panel", cuda, torch.float32))
    assert "bfloat16" in str(BACKENDS.probe("panel", CPU, torch.bfloat16))
    assert "float64" in str(BACKENDS.probe("onednn", CPU, torch.float64))
