"""Checkpoints of each quantized format, written by its definition, and the numbers they stand for.

Codes are packed one by one, as whole numbers of Python; the numbers come from the codes before
they are packed. Nothing here is shared with what reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

_GROUP = 16
_BLOCK = (32, 16)
_FP8 = torch.float8_e4m3fn
# Of NF4: quantiles of the normal distribution, as its authors list them.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class Stored(NamedTuple):
    """A matrix (out x in) as a checkpoint has it."""

    # By the ends of names.
    tensors: dict[str, torch.Tensor]
    # The numbers of the format's definition.
    dense: torch.Tensor


class CodedFormat(NamedTuple):
    """How a checkpoint of a format is written."""

    config: Mapping[str, Any]
    store: Callable[[torch.Tensor], Stored]


def fp8_blocks(weight: torch.Tensor) -> Stored:
    num_out, num_in = weight.shape
    rows, columns = (range(0, size, step) for size, step in zip(weight.shape, _BLOCK, strict=True))
    scales = torch.empty(len(rows), len(columns))
    codes, dense = torch.empty(num_out, num_in, dtype=_FP8), torch.empty(num_out, num_in)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            part = np.s_[row : row + _BLOCK[0], column : column + _BLOCK[1]]
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(_FP8)
            dense[part] = codes[part].float() * scales[i, j]
    return Stored({"weight": codes, "weight_scale_inv": scales}, dense)


def fp8_rows(weight: torch.Tensor) -> Stored:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scales.float()).clamp(-448, 448).to(_FP8)
    return Stored({"weight": codes, "weight_scale": scales}, codes.float() * scales.float())


def fp8_whole(weight: torch.Tensor) -> Stored:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(_FP8)
    beside = {"input_scale": torch.tensor(0.1), "weight_scale": scale.clone()}
    return Stored({"weight": codes, **beside}, codes.float() * scale)


def int8_rows(weight: torch.Tensor) -> Stored:
    codes, scales, zeros = _grouped(weight, weight.shape[1], bits=8)
    dense = _dense(codes, scales, zeros, weight.shape[1])
    signed = {"weight": codes - 128, "weight_zero_point": zeros - 128}
    tensors = {name: torch.from_numpy(each.astype(np.int8)) for name, each in signed.items()}
    return Stored({**tensors, "weight_scale": torch.from_numpy(scales)}, dense)


def packed_symmetric(weight: torch.Tensor) -> Stored:
    codes, scales, zeros = _grouped(weight, _GROUP, symmetric=True)
    assert (zeros == 8).all()
    tensors = {
        "weight_packed": _packed(codes, 4),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor(weight.shape),
    }
    return Stored(tensors, _dense(codes, scales, zeros, _GROUP))


def packed_with_zeros(weight: torch.Tensor) -> Stored:
    places = _places(weight.shape[1])
    codes, scales, zeros = _grouped(weight[:, _sorted(places)], _GROUP)
    dense = _dense(codes, scales, zeros, _GROUP)
    back = np.argsort(_sorted(places))
    tensors = {
        "weight_packed": _packed(codes[:, back], 4),
        "weight_scale": torch.from_numpy(scales),
        "weight_zero_point": _packed(zeros.T, 4).T.contiguous(),
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": torch.from_numpy(places),
    }
    return Stored(tensors, dense[:, back])


def gptq(weight: torch.Tensor, *, less: int = 1, index: bool = True, bits: int = 4) -> Stored:
    places = _places(weight.shape[1])
    order = _sorted(places) if index else np.arange(weight.shape[1])
    codes, scales, zeros = _grouped(weight[:, order], _GROUP, bits=bits, half=True)
    dense = _dense(codes, scales, zeros, _GROUP)
    back = np.argsort(order)
    tensors = {
        "qweight": _packed(codes[:, back], bits).T.contiguous(),
        "qzeros": _packed((zeros.T - less) % (1 << bits), bits),
        "scales": torch.from_numpy(scales).T.contiguous().half(),
    }
    if index:
        tensors["g_idx"] = torch.from_numpy(places)
    return Stored(tensors, dense[:, back])


def awq(weight: torch.Tensor) -> Stored:
    codes, scales, zeros = _grouped(weight, _GROUP, half=True)
    places = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    # Eight outputs of a word, the first of these in its lowest bits.
    order = (np.arange(0, weight.shape[0], 8)[:, None] + places).ravel()
    tensors = {
        "qweight": _packed(codes.T[:, order], 4),
        "qzeros": _packed(zeros.T[:, order], 4),
        "scales": torch.from_numpy(scales).T.contiguous().half(),
    }
    return Stored(tensors, _dense(codes, scales, zeros, _GROUP))


def mlx(weight: torch.Tensor) -> Stored:
    codes, scales, zeros = _grouped(weight, _GROUP, half=True)
    offsets = (-zeros * scales).astype(np.float16).astype(np.float32)
    dense = codes * scales.repeat(_GROUP, 1) + offsets.repeat(_GROUP, 1)
    tensors = {
        "weight": _packed(codes, 4).view(torch.uint32),
        "scales": torch.from_numpy(scales).half(),
        "biases": torch.from_numpy(offsets).half(),
    }
    return Stored(tensors, torch.from_numpy(dense.astype(np.float32)))


_FP4 = np.array((0, 0.5, 1, 1.5, 2, 3, 4, 6), dtype=np.float32)
_FP4_VALUES = np.concatenate((_FP4, -_FP4))


def nvfp4(weight: torch.Tensor, *, compressed: bool) -> Stored:
    groups = weight.numpy().reshape(weight.shape[0], -1, 16)
    whole = np.float32(3.7 if compressed else 0.37)
    factor = 1 / whole if compressed else whole
    scales = torch.from_numpy(np.abs(groups).max(-1) / 6 / factor).to(_FP8)
    exact = scales.float().numpy()
    found = exact / whole if compressed else exact * whole
    packed, dense = _four_bits(groups, found)
    tensors = {"weight_scale": scales, "input_scale": torch.tensor(0.1)}
    if compressed:
        tensors |= {"weight_packed": packed, "weight_global_scale": torch.tensor([whole])}
    else:
        tensors |= {"weight": packed, "weight_scale_2": torch.tensor(whole)}
    return Stored(tensors, dense.reshape(weight.shape))


def mxfp4_linear(weight: torch.Tensor) -> Stored:
    groups = weight.numpy().reshape(weight.shape[0], -1, 32)
    powers = np.ceil(np.log2(np.abs(groups).max(-1) / 6)).astype(np.int64)
    packed, dense = _four_bits(groups, (2.0**powers).astype(np.float32))
    scales = torch.from_numpy((powers + 127).astype(np.uint8))
    return Stored({"weight_packed": packed, "weight_scale": scales}, dense.reshape(weight.shape))


def _four_bits(groups: np.ndarray, scales: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return floats of four bits, two in a byte, and what they stand for."""
    codes = np.abs(groups[..., None] / scales[..., None, None] - _FP4_VALUES).argmin(-1)
    dense = (_FP4_VALUES[codes] * scales[..., None]).astype(np.float32)
    pairs = codes.reshape(codes.shape[0], -1, 2)
    packed = (pairs[..., 0] + 16 * pairs[..., 1]).astype(np.uint8)
    return torch.from_numpy(packed), torch.from_numpy(dense)


def bitsandbytes_rows(weight: torch.Tensor) -> Stored:
    largest = weight.abs().amax(1)
    codes = (weight * 127 / largest[:, None]).round().to(torch.int8)
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Stored(tensors, codes.float() * (largest / 127)[:, None])


def nf4(weight: torch.Tensor, *, nested: bool = False) -> Stored:
    flat = weight.flatten().numpy().reshape(-1, 64)
    largest = np.abs(flat).max(1)
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape),
    }  # fmt: skip
    table = np.array(_NF4, dtype=np.float32)
    beside = {"absmax": torch.from_numpy(largest)}
    if nested:
        beside, largest = _nested(largest, state)
    nearest = np.abs(flat[..., None] / largest[:, None, None] - table).argmin(-1)
    dense = table[nearest] * largest[:, None]
    pairs = nearest.reshape(-1, 2)
    packed = torch.from_numpy((pairs[:, :1] * 16 + pairs[:, 1:]).astype(np.uint8))
    tensors = {f"weight.{name}": each for name, each in beside.items()}
    tensors["weight.quant_map"] = torch.from_numpy(table)
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    dense = dense.astype(np.float32).reshape(weight.shape)
    return Stored({"weight": packed, **tensors}, torch.from_numpy(dense))


def _nested(
    largest: np.ndarray, state: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Store what is largest in blocks as codes themselves; return what they stand for."""
    size, offset = 8, float(largest.mean())
    state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
    table = np.linspace(-1, 1, 256, dtype=np.float32)
    codes, tops = [], []
    for start in range(0, len(largest), size):
        block = largest[start : start + size] - offset
        tops.append(np.abs(block).max())
        codes.extend(int(np.abs(table - each / tops[-1]).argmin()) for each in block)
    found = [
        np.float32(table[c] * tops[i // size]) + np.float32(offset) for i, c in enumerate(codes)
    ]
    tensors = {
        "absmax": torch.tensor(codes, dtype=torch.uint8),
        "nested_absmax": torch.tensor(np.array(tops, dtype=np.float32)),
        "nested_quant_map": torch.from_numpy(table),
    }
    return tensors, np.array(found, dtype=np.float32)


def _grouped(
    weight: torch.Tensor, size: int, *, bits: int = 4, symmetric: bool = False, half: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes of 0 and more (out x in), scales and zeros (out x groups)."""
    groups = weight.numpy().reshape(weight.shape[0], -1, size)
    top = (1 << bits) - 1
    if symmetric:
        scales = np.abs(groups).max(-1) / (top // 2)
        zeros = np.full(scales.shape, top // 2 + 1)
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scales = (high - low) / top
        zeros = np.round(-low / scales).astype(np.int64)
    scales = scales.astype(np.float16 if half else np.float32).astype(np.float32)
    codes = np.clip(np.round(groups / scales[..., None]) + zeros[..., None], 0, top)
    return codes.astype(np.int64).reshape(weight.shape), scales, zeros


def _dense(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, size: int) -> torch.Tensor:
    """Return (code - zero) x scale, group by group."""
    dense = np.empty(codes.shape, dtype=np.float32)
    for group in range(scales.shape[1]):
        part = np.s_[:, group * size : (group + 1) * size]
        dense[part] = (codes[part] - zeros[:, [group]]) * scales[:, [group]].astype(np.float64)
    return torch.from_numpy(dense)


def _packed(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Return codes of each row in words of 32 bits, the first in the lowest."""
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        words = [row[start : start + per_word] for start in range(0, len(row), per_word)]
        rows.append([sum(code << (bits * at) for at, code in enumerate(word)) for word in words])
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def _places(num_in: int) -> np.ndarray:
    """Return the group of each input, in no order; each has as many."""
    groups = np.arange(num_in) // _GROUP
    return np.random.default_rng(num_in).permutation(groups).astype(np.int32)


def _sorted(places: np.ndarray) -> np.ndarray:
    """Return the inputs in the order of their groups."""
    return np.argsort(places, kind="stable")


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip


FORMATS: dict[str, CodedFormat] = {
    "fp8 blocks": CodedFormat({"quant_method": "fp8", "weight_block_size": list(_BLOCK)}, fp8_blocks),
    "fp8 rows": CodedFormat({"quant_method": "fbgemm_fp8"}, fp8_rows),
    "fp8 whole": CodedFormat({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_whole),
    "float-quantized": CodedFormat(
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_rows
    ),
    "int-quantized": CodedFormat(
        _compressed("int-quantized", num_bits=8, type="int", strategy="channel"), int8_rows
    ),
    "pack-quantized": CodedFormat(
        _compressed("pack-quantized", num_bits=4, type="int", group_size=_GROUP), packed_symmetric
    ),
    "pack-quantized, ordered": CodedFormat(
        _compressed("pack-quantized", num_bits=4, type="int", group_size=_GROUP), packed_with_zeros
    ),
    "nvfp4-pack-quantized": CodedFormat(
        _compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
        lambda weight: nvfp4(weight, compressed=True),
    ),
    "mxfp4-pack-quantized": CodedFormat(
        _compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32), mxfp4_linear
    ),
    "nvfp4 of ModelOpt": CodedFormat(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda weight: nvfp4(weight, compressed=False),
    ),
    "gptq": CodedFormat({"quant_method": "gptq", "bits": 4, "group_size": _GROUP}, gptq),
    "gptq 8 bits": CodedFormat(
        {"quant_method": "gptq", "bits": 8, "group_size": _GROUP},
        lambda weight: gptq(weight, bits=8, index=False),
    ),
    "gptq_v2": CodedFormat(
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda weight: gptq(weight, less=0),
    ),
    "awq": CodedFormat({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "mlx": CodedFormat({"bits": 4, "group_size": _GROUP}, mlx),
    "bitsandbytes 8 bits": CodedFormat(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_rows
    ),
    "bitsandbytes nf4": CodedFormat({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4),
    "bitsandbytes nested": CodedFormat(
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda weight: nf4(weight, nested=True),
    ),
}  # fmt: skip


def store_coded(folder: Path, name: str) -> Path:
    """Return a copy of a model with its projections in a format; ``folder`` takes their numbers."""
    config, store = FORMATS[name]
    target = Path(shutil.copytree(folder, folder.with_name("coded")))
    tensors: dict[str, torch.Tensor] = {}
    plain = load_file(folder / "model.safetensors")
    for key, weight in plain.items():
        if not key.endswith("_proj.weight"):
            tensors[key] = weight
            continue
        stored = store(weight)
        stem = key.removesuffix("weight")
        tensors |= {f"{stem}{end}": each for end, each in stored.tensors.items()}
        assert stored.dense.shape == weight.shape
        plain[key] = stored.dense.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((target / "config.json").read_text())
    document["quantization" if name == "mlx" else "quantization_config"] = config
    (target / "config.json").write_text(json.dumps(document))
    return target
