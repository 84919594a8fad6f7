"""Quantized weights as a GPU computes with them, by operations of torch itself.

int4: rows stay in 16 bits, weights are codes of four bits with a scale and an offset for each group
of inputs. fp8: weights and rows are E4M3 numbers, each row of either with a scale of its own, and
products are summed in float32: rows are rounded too, unlike in every other format here.

The same operations exist on CPUs, where they are tested; nobody is served so there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from lorax_shard.linear.interface import LinearKernel
from lorax_shard.linear.quantized import formats
from lorax_shard.linear.quantized.formats import (
    MOST_FP8,
    Format,
    QuantizedWeight,
    to_fp8,
    to_int4,
)

# Rows of the identity that are multiplied at a time to read a packed weight.
_CHUNK = 256
# So many pieces of 16 inputs lie together in packed codes.
_INNER_TILES = 2
# What outputs and inputs must be multiples of.
_MULTIPLES = {formats.FP8: (16, 16), formats.INT4: (16, formats.INT4.group_size)}
# The first GPUs with the operation: Ada and Ampere.
_CAPABILITY = {formats.FP8: (8, 9), formats.INT4: (8, 0)}
# Largest difference of the trial's products, as a share of the largest one.
_TOLERANCE = 2e-2


def fits(format_: Format, shape: torch.Size) -> bool:
    """Return whether the operation takes a weight of this shape (out x in)."""
    return not any(size % unit for size, unit in zip(shape, _MULTIPLES[format_], strict=True))


def round_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as E4M3 numbers, and the scale of each (rows x 1)."""
    rows = rows.float()
    scales = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / MOST_FP8
    codes = (rows / scales).clamp(-MOST_FP8, MOST_FP8).to(torch.float8_e4m3fn)
    return codes, scales


class _Rounding:
    """Whether rows are rounded: they are, but for a look at all the rest of a model."""

    is_on = True


@contextmanager
def rows_unrounded() -> Iterator[None]:
    """Compute with rows as they are meanwhile, by plain products; for checks at load only."""
    _Rounding.is_on = False
    try:
        yield
    finally:
        _Rounding.is_on = True


class Int4Kernel:
    """A weight (out x in) in codes of four bits; rows are ``dtype``, on GPUs bfloat16."""

    __slots__ = ("_bias", "_group", "_num_in", "_packed", "_product", "_shared", "nbytes")

    def __init__(
        self, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        assert weight.scales is not None
        assert weight.offsets is not None
        self._num_in = weight.codes.shape[1]
        self._group = weight.format.group_size
        self._bias = bias
        # groups x out x 2, as the operation takes them.
        shared = torch.stack((weight.scales, weight.offsets), dim=-1).to(dtype)
        self._shared = shared.transpose(0, 1).contiguous()
        codes = (weight.codes + 8).to(torch.int32)
        ops: Any = torch
        if codes.is_cuda:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            self._packed = ops._convert_weight_to_int4pack(pairs, _INNER_TILES)
            self._product = ops._weight_int4pack_mm
        else:
            self._packed = ops._convert_weight_to_int4pack_for_cpu(codes, _INNER_TILES)
            self._product = ops._weight_int4pack_mm_for_cpu
        self.nbytes = self._packed.nbytes + self._shared.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute all rows in one call."""
        rows = x.reshape(-1, self._num_in).contiguous()
        y: torch.Tensor = self._product(rows, self._packed, self._group, self._shared)
        if self._bias is not None:
            y += self._bias
        return y.view(*x.shape[:-1], -1)

    def dense(self) -> torch.Tensor:
        """Return the weight in the rows' dtype: what the products of single inputs are."""
        one = torch.eye(self._num_in, dtype=self._shared.dtype, device=self._shared.device)
        parts = [
            self._product(part.contiguous(), self._packed, self._group, self._shared)
            for part in torch.split(one, _CHUNK)
        ]
        return torch.cat(parts).T.contiguous()


class Fp8Kernel:
    """A weight (out x in) of E4M3 numbers with a scale for each row, and rows rounded so too."""

    __slots__ = ("_bias", "_codes", "_dtype", "_scales", "nbytes")

    def __init__(
        self, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        assert weight.scales is not None
        self._codes, self._bias, self._dtype = weight.codes, bias, dtype
        self._scales = weight.scales.float().view(1, -1).contiguous()
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Round the rows, and compute all of them in one call."""
        if not _Rounding.is_on:
            return functional.linear(x, self.dense(), self._bias)
        codes, scales = round_rows(x.reshape(-1, self._codes.shape[1]))
        product: Any = torch._scaled_mm
        y: torch.Tensor = product(
            codes, self._codes.t(), scale_a=scales, scale_b=self._scales, out_dtype=self._dtype
        )
        if self._bias is not None:
            y += self._bias
        return y.view(*x.shape[:-1], -1)

    def dense(self) -> torch.Tensor:
        """Return the weight in the rows' dtype, as if rows were not rounded."""
        return (self._codes.float() * self._scales.view(-1, 1)).to(self._dtype)


class DevicePacker:
    """Makes the kernels of weights in fp8 and int4."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def pack(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> LinearKernel:
        """Return the kernel of a weight, on the weight's device."""
        if weight.format is formats.INT4:
            return Int4Kernel(weight, bias, self._dtype)
        return Fp8Kernel(weight, bias, self._dtype)


def refusal(format_: Format, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in words why a device cannot compute in a format; a small product is tried."""
    if device.type == "cuda":
        has, needs = torch.cuda.get_device_capability(device), _CAPABILITY[format_]
        if has < needs:
            return f"{format_.name} needs compute capability {needs[0]}.{needs[1]}, and this GPU has {has[0]}.{has[1]}"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator).to(device)
    rows = torch.randn(5, 64, generator=generator).to(device, dtype)
    made = to_int4(weight) if format_ is formats.INT4 else to_fp8(weight)
    try:
        got = DevicePacker(dtype).pack(made, None)(rows).float()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"torch {torch.__version__} does not compute {format_.name} here: {error}"
    if format_ is formats.FP8:
        codes, scales = round_rows(rows)
        rows = codes.float() * scales
    expected = rows.float() @ made.dense().T
    if float((got - expected).abs().max()) > _TOLERANCE * float(expected.abs().max()):
        return f"torch {torch.__version__} computes {format_.name} wrongly here"
    return None
