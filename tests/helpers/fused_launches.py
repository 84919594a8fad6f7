"""Programs for a GPU that is not there: the elementwise work of steps, launch by launch."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import torch
from tests.helpers.fake_gpu import Compiled, FakeGPU
from tests.helpers.gpu_launches import models, plugged_model, step, triton_attention
from torch.utils._python_dispatch import TorchDispatchMode

from lorax_shard.attention.kv_cache import FP8
from lorax_shard.fused import gates, layers, norms, rotary
from lorax_shard.fused.backend import (
    GateFunction,
    KVSlots,
    PendingRotation,
    RmsNorm,
    Rotation,
    WeightedNorm,
)
from lorax_shard.fused.triton.backend import TritonElementwise
from lorax_shard.model import elementwise

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
            pending = PendingRotation(
                query.transpose(1, 2), key.transpose(1, 2), angles, angles, rotation
            )
            backend.rotate(*pending)
            # Of a step's differences the slots begin anywhere.
            slots = torch.zeros(rows + 3, dtype=torch.int64)[rows % 4 :][:rows]
            # GPUs that know eight bits are those of the test of bfloat16.
            for kv_dtype in (dtype, FP8) if dtype is torch.bfloat16 else (dtype,):
                keys, values = torch.zeros(2, 4, 16, kv_heads, dim).to(kv_dtype)
                value = stacked[:, :, heads + kv_heads :].transpose(1, 2)
                backend.rotate_and_store(pending, value, KVSlots(keys, values, slots))


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
    assert gpu.launches.keys() == {"rms_norm", "add_norms", "gated", "rotate", "rotate_and_store"}
    return gpu.binaries[warm:]


class Computed(TorchDispatchMode):
    """Counts what torch would launch: all but views and memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        result = func(*args, **(kwargs or {}))
        is_view = any(each.alias_info for each in func._schema.returns)
        is_cast = name == "to" and result is not args[0]
        if "empty" not in name and (is_cast or not is_view):
            self.names[name] += 1
        return result


def launches_of_a_layer(gpu: FakeGPU, is_fused: bool) -> list[Compiled]:
    """Launch a decode step of a Llama, and of one with a layer less; print what a layer launches."""
    counts = []
    triton_attention._num_processors = lambda device: 132
    for number in (2, 1):
        model = plugged_model(models.LlamaShape(256, 512, number, 4, 2, 1000))
        if is_fused:
            _install(model._model)
        model.allocate_cache(600, models.BLOCK_SIZE)
        gpu.launches.clear()
        with Computed() as computed:
            step(model, 200, 1, 64, [None])
        counts.append(gpu.launches + computed.names)
    of_a_layer = counts[0] - counts[1]
    print(f"launches of a layer: {dict(sorted(of_a_layer.items()))}")
    assert of_a_layer.total() == (9 if is_fused else 36), of_a_layer
    if is_fused:
        between = {"add_norms": 2, "gated": 1, "rotate_and_store": 1}
        assert of_a_layer == {"linear": 4, "decode": 1, **between}, of_a_layer
    return gpu.binaries


def _install(model: Any) -> None:
    """Install without trials: kernels of a GPU that is not there compute nothing."""
    for each in (gates, layers, norms, rotary):
        each.closest = lambda candidates, own: next(iter(candidates))  # type: ignore[attr-defined]
    importlib.import_module("lorax_shard.fused.install").failure = lambda backend, like: None
    TritonElementwise.probe = classmethod(lambda *_: None)
    elementwise.install(model, "triton", torch.device("cpu"), torch.bfloat16)
