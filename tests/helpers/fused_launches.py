"""Programs for a GPU that is not there: the elementwise work of steps, launch by launch."""

from __future__ import annotations

import torch
from tests.helpers.fake_gpu import Compiled, FakeGPU

from lorax_shard.fused.backend import GateFunction, RmsNorm, Rotation, WeightedNorm
from lorax_shard.fused.triton.backend import TritonElementwise

# Hidden width, heads, KV heads, width of a head, inner width: of 8B and 135M models.
SHAPES = ((4096, 32, 8, 128, 14336), (576, 9, 3, 64, 1536))
ROW_COUNTS = (1, 2, 3, 15, 16, 17, 64, 100, 256, 700, 2048)
ROTATIONS = (Rotation(False, False), Rotation(True, False), Rotation(True, True))


def layer(shape: tuple[int, ...], dtype: torch.dtype, rows: int) -> None:
    """Launch what a layer computes over so many rows, q, k and v in one tensor, and gate and up."""
    backend = TritonElementwise()
    hidden, heads, kv_heads, dim, inner = shape

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    for offset in (0.0, 1.0):
        backend.rms_norm(zeros(1, rows, hidden), zeros(hidden), RmsNorm(1e-6, offset, True))
    norm = WeightedNorm(RmsNorm(1e-6, 0.0, True), zeros(hidden))
    for sides in ((None, norm), (norm, norm), (norm, None), (None, None)):
        backend.add_norms(zeros(1, rows, hidden), zeros(1, rows, hidden), *sides)
    stacked = zeros(1, rows, (heads + 2 * kv_heads) * dim).view(1, rows, -1, dim)
    query, key = stacked[:, :, :heads], stacked[:, :, heads : heads + kv_heads]
    for each in (query, key):
        backend.rms_norm(each, zeros(dim), RmsNorm(1e-6, 0.0, True))
    gate, up = zeros(1, rows, 2 * inner).chunk(2, dim=-1)
    for activation in GateFunction:
        backend.gated(gate, up, activation)
    for rotation in ROTATIONS:
        for width in (dim, dim // 2):
            angles = zeros(1, rows, width)
            backend.rotate(query.transpose(1, 2), key.transpose(1, 2), angles, angles, rotation)


def kernels(gpu: FakeGPU, dtype: str) -> list[Compiled]:
    """Return what layers compile."""
    for shape in SHAPES:
        layer(shape, getattr(torch, dtype), 7)
    return gpu.binaries


def steps(gpu: FakeGPU, dtype: str) -> list[Compiled]:
    """Return what other numbers of rows compile after one."""
    layer(SHAPES[0], getattr(torch, dtype), 7)
    warm = len(gpu.binaries)
    assert warm > 0
    for rows in ROW_COUNTS:
        layer(SHAPES[0], getattr(torch, dtype), rows)
    assert gpu.launches.keys() == {"rms_norm", "add_norms", "gated", "rotate"}
    return gpu.binaries[warm:]
