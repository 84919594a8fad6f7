"""fp8 and int4 by operations of torch, on the CPU that has them too."""

from __future__ import annotations

import pytest
import torch

from lorax_shard.linear.quantized import device
from lorax_shard.linear.quantized.device import DevicePacker, fits, refusal, round_rows
from lorax_shard.linear.quantized.formats import (
    FP8,
    INT4,
    Format,
    QuantizedWeight,
    stack,
    to_fp8,
    to_int4,
)

CPU = torch.device("cpu")
SHAPES = ((16, 32), (48, 96), (80, 192))
# Rounding of what is added up, as a share of the largest output.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def made(format_: Format, num_out: int, num_in: int) -> QuantizedWeight:
    weight = torch.randn(num_out, num_in)
    # A row, and a group, of equal numbers.
    weight[1] = 0
    weight[2, :32] = 0.25
    return to_int4(weight) if format_ is INT4 else to_fp8(weight)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format_", [FP8, INT4], ids=lambda each: each.name)
def test_it_computes_the_product_of_its_numbers(
    format_: Format, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = made(format_, *shape), torch.randn(shape[0]).to(dtype)
    kernel = DevicePacker(dtype).pack(weight, bias)
    dense = weight.dense()
    scale = float(dense.abs().max())
    assert kernel.dense().dtype is dtype
    torch.testing.assert_close(
        kernel.dense().float(), dense, rtol=0, atol=TOLERANCES[dtype] * scale
    )
    for rows in (1, 5, 40):
        x = torch.randn(2, rows, shape[1]).to(dtype)
        seen = x.float()
        if format_ is FP8:
            # Each row is rounded to E4M3 numbers of its own scale.
            scales = seen.abs().amax(-1, keepdim=True) / 448
            seen = (seen / scales).to(torch.float8_e4m3fn).float() * scales
        expected = seen @ dense.T + bias.float()
        got = kernel(x)
        assert got.dtype is dtype
        torch.testing.assert_close(
            got.float(), expected, rtol=0, atol=TOLERANCES[dtype] * float(expected.abs().max())
        )


def test_a_row_of_fp8_is_the_same_in_any_company() -> None:
    torch.manual_seed(1)
    x = torch.randn(7, 64) * torch.logspace(-3, 3, 7).unsqueeze(1)
    codes, scales = round_rows(x)
    for row in range(7):
        alone = round_rows(x[row : row + 1])
        assert torch.equal(alone[0].float(), codes[row : row + 1].float())
        assert torch.equal(alone[1], scales[row : row + 1])
    assert float((codes.float() * scales - x).abs().div(x.abs().amax(1, keepdim=True)).max()) < 0.04
    assert not round_rows(torch.zeros(2, 64))[0].float().any()


def test_int4_is_nearer_than_steps_over_the_whole_range() -> None:
    torch.manual_seed(2)
    weight = torch.randn(64, 128)
    found = to_int4(weight)
    assert found.codes.min() == -8
    assert found.codes.max() == 7
    groups = weight.view(64, 4, 32)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (most - least) / 15
    plain = ((groups - least) / step).round() * step + least
    off = (found.dense().view_as(groups) - groups).square().sum(-1)
    off_plain = (plain - groups).square().sum(-1)
    # Scales and offsets are rounded to bfloat16.
    assert (off <= 1.3 * off_plain).all()
    assert off.sum() < 0.95 * off_plain.sum()


def test_fp8_of_a_part_has_the_scales_of_the_whole() -> None:
    torch.manual_seed(3)
    weight = torch.randn(32, 96)
    whole, part = to_fp8(weight), to_fp8(weight[:, 32:64], weight.abs().amax(1))
    assert torch.equal(part.dense(), whole.dense()[:, 32:64])


@pytest.mark.parametrize("format_", [FP8, INT4], ids=lambda each: each.name)
def test_siblings_lie_one_below_the_other(format_: Format) -> None:
    torch.manual_seed(4)
    parts = [made(format_, 32, 64), made(format_, 16, 64)]
    together = stack(parts)
    assert together is not None
    assert together.codes.dtype is parts[0].codes.dtype
    assert torch.equal(together.dense(), torch.cat([each.dense() for each in parts]))


def test_shapes_that_the_operations_do_not_take() -> None:
    assert fits(FP8, torch.Size((48, 80)))
    assert fits(INT4, torch.Size((48, 96)))
    for format_, shape in ((FP8, (40, 80)), (FP8, (48, 72)), (INT4, (24, 64)), (INT4, (48, 80))):
        assert not fits(format_, torch.Size(shape))


@pytest.mark.parametrize("format_", [FP8, INT4], ids=lambda each: each.name)
def test_a_device_that_computes_wrongly_or_not_at_all_is_told_of(
    format_: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(format_, CPU, torch.bfloat16) is None
    kernel = device.Int4Kernel if format_ is INT4 else device.Fp8Kernel
    real = kernel.__call__
    monkeypatch.setattr(kernel, "__call__", lambda self, x: real(self, x) * 1.1)
    assert "wrongly" in str(refusal(format_, CPU, torch.bfloat16))

    def fails(_self: object, _x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(kernel, "__call__", fails)
    assert "no kernel image" in str(refusal(format_, CPU, torch.bfloat16))
