"""The backends. Their library calls are looked up when one is made, not on import."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

# MKL's packing serves one row count: this one, and fewer rows that are padded up to it.
MKL_ROWS = 32
_MKL_PAD_FROM = 5


class TorchKernel:
    """The plain matrix product on the plain weight."""

    __slots__ = ("_bias", "_weight", "nbytes")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.nbytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute with ``torch.nn.functional.linear``."""
        return functional.linear(x, self._weight, self._bias)

    def dense(self) -> torch.Tensor:
        """Return the weight itself."""
        return self._weight


class TorchBackend:
    """``torch.nn.functional.linear``: any device, any dtype, the reference."""

    name = "torch"
    supersedes: tuple[str, ...] = ()
    in_programs = False
    keeps_plain = True

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:  # noqa: ARG003 - it can run everywhere
        """It can always run."""
        return None

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> TorchKernel:
        """Keep the weight as it is."""
        return TorchKernel(weight, bias)


class OneDnnKernel:
    """A weight in oneDNN's blocked layout, which serves every row count."""

    __slots__ = ("_bias", "_op", "_packed", "nbytes")

    def __init__(self, packed: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed, self._bias = packed, bias
        self._op: Any = torch.ops.mkldnn._linear_pointwise.default
        self.nbytes = packed.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute on the packed weight."""
        result: torch.Tensor = self._op(x, self._packed, self._bias, "none", [], "")
        return result

    def dense(self) -> torch.Tensor:
        """Return the weight unpacked: exactly the numbers that were packed."""
        return self._packed.to_dense()


class OneDnnBackend:
    """oneDNN with weights packed once; the plain weight is not needed any more."""

    name = "onednn"
    supersedes: tuple[str, ...] = ()
    in_programs = False
    keeps_plain = False

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs a CPU, a torch with oneDNN, and float32 or bfloat16 in hardware."""
        if device.type != "cpu":
            return f"oneDNN computes on the CPU, not on {device.type}"
        if not torch._C._has_mkldnn or not _has_op("mkldnn", "_linear_pointwise"):
            return "this torch is built without oneDNN"
        if dtype is torch.float32:
            return None
        if dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        return f"oneDNN has no fast path for {dtype} on this CPU"

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> OneDnnKernel:
        """Copy the weight into oneDNN's layout."""
        return OneDnnKernel(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias)


class MklKernel:
    """A weight packed by MKL for ``MKL_ROWS`` rows, beside the plain one for all others.

    MKL's operator takes the plain product without a word when the row count is another one,
    so fewer rows are padded with zeros up to it as long as that is cheaper.
    """

    __slots__ = ("_bias", "_op", "_packed", "_weight", "nbytes")

    def __init__(
        self, weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._weight, self._packed, self._bias = weight, packed, bias
        self._op: Any = torch.ops.mkl._mkl_linear.default
        self.nbytes = weight.nbytes + packed.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute on the packed weight if the row count allows it."""
        rows = x.numel() // x.shape[-1]
        if not _MKL_PAD_FROM <= rows <= MKL_ROWS:
            return functional.linear(x, self._weight, self._bias)
        flat = x.reshape(rows, -1)
        padded = functional.pad(flat, (0, 0, 0, MKL_ROWS - rows)) if rows < MKL_ROWS else flat
        result: torch.Tensor = self._op(padded, self._packed, self._weight, self._bias, MKL_ROWS)
        return result[:rows].reshape(*x.shape[:-1], -1)

    def dense(self) -> torch.Tensor:
        """Return the weight itself."""
        return self._weight


class MklBackend:
    """MKL with weights packed for one row count; holds every weight twice."""

    name = "mkl"
    supersedes: tuple[str, ...] = ()
    in_programs = False
    keeps_plain = True

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs a CPU, a torch with MKL, and float32."""
        if device.type != "cpu":
            return f"MKL computes on the CPU, not on {device.type}"
        if not torch._C.has_mkl or not _has_op("mkl", "_mkl_linear"):
            return "this torch is built without MKL"
        return None if dtype is torch.float32 else f"MKL packs float32 only, not {dtype}"

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> MklKernel:
        """Pack the weight for ``MKL_ROWS`` rows and keep it."""
        weight = weight.contiguous()
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, MKL_ROWS)
        return MklKernel(weight, packed, bias)


class CompositeKernel:
    """One kernel up to some row count, another one above it."""

    __slots__ = ("_fallback", "_kernels", "_limits", "nbytes")

    def __init__(self, limits: tuple[int, ...], kernels: tuple[Any, ...]) -> None:
        # limits[i] is the largest row count of kernels[i]; the last kernel has no limit.
        self._limits = tuple(zip(limits, kernels, strict=False))
        self._fallback, self._kernels = kernels[-1], kernels
        self.nbytes = sum(kernel.nbytes for kernel in dict.fromkeys(kernels))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute with the kernel for this number of rows."""
        rows = x.numel() // x.shape[-1]
        for limit, kernel in self._limits:
            if rows <= limit:
                result: torch.Tensor = kernel(x)
                return result
        last: torch.Tensor = self._fallback(x)
        return last

    def dense(self) -> torch.Tensor:
        """Return the plain weight."""
        weight: torch.Tensor = self._kernels[0].dense()
        return weight


class CompositeBackend:
    """Picks a backend by row count; each distinct one holds its own form of the weight."""

    def __init__(self, limits: tuple[int, ...], backends: tuple[Any, ...]) -> None:
        # Neighbours of one kind become one.
        kept = [i for i in range(len(limits)) if backends[i] is not backends[i + 1]]
        self._limits = tuple(limits[i] for i in kept)
        self._backends = (*(backends[i] for i in kept), backends[-1])
        parts = [f"{backends[i].name} to {limits[i]} rows" for i in kept]
        self.name = ", ".join([*parts, f"{backends[-1].name} above"])
        self.keeps_plain = any(each.keeps_plain for each in backends)

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> CompositeKernel:
        """Pack the weight once for each distinct backend."""
        packed = {each: each.pack(weight, bias) for each in dict.fromkeys(self._backends)}
        return CompositeKernel(self._limits, tuple(packed[each] for each in self._backends))


def _has_op(library: str, name: str) -> bool:
    return hasattr(getattr(torch.ops, library), name)
