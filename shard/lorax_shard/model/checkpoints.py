"""Recognizes quantized checkpoints before anything of them is loaded.

Their tensors hold codes, which as weights would be garbage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorax_shard.files import read_json

# Where a configuration says how weights are stored: transformers, older compressed-tensors, MLX.
_KEYS = ("quantization_config", "compression_config", "quantization")
# Configurations of models whose language model is a part of them.
_NESTED = ("text_config", "llm_config")
# Files beside config.json that tools have written, with the name of what they quantize by.
_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
# How weights of safetensors are named that hold numbers as they are; all others are codes.
_PLAIN = ("F32", "F16", "BF16", "F64")
_INSTEAD = (
    "serve the model that it was made from, with --quantize int8 where memory is short, or a GGUF "
    "file of it"
)
_NAMES = {
    "gptq": "GPTQ", "awq": "AWQ", "eetq": "EETQ", "exl2": "EXL2", "exl3": "EXL3", "hqq": "HQQ",
    "bitsandbytes": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes", "fp8": "FP8", "fbgemm_fp8": "FP8", "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors", "modelopt": "ModelOpt", "mlx": "MLX",
}  # fmt: skip


def refuse_quantized(folder: Path, document: Mapping[str, Any]) -> str | None:
    """Return why a checkpoint cannot be served because it is quantized, or None."""
    if method := _method(folder, document):
        return f"it is quantized ({_NAMES.get(method, method)}); {_INSTEAD}"
    return None


def refuse_codes(files: Iterable[Path]) -> str | None:
    """Return why weights cannot be served that hold codes although no configuration says so."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    dtype = file.get_slice(name).get_dtype()
                    if name.endswith("weight") and dtype not in _PLAIN:
                        return f"{name} is stored as {dtype}, so it is quantized; {_INSTEAD}"
        except (SafetensorError, OSError, ValueError):
            # Damage has its own words elsewhere.
            return None
    return None


def _method(folder: Path, document: Mapping[str, Any]) -> str | None:
    """Return by what a checkpoint is quantized, None if nothing says so."""
    nested = [document.get(name) for name in _NESTED]
    for each in (document, *nested):
        if not isinstance(each, Mapping):
            continue
        for key in _KEYS:
            found = each.get(key)
            if isinstance(found, Mapping) and found:
                fallback = "mlx" if key == "quantization" else "an unnamed method"
                return str(found.get("quant_method") or fallback).lower()
    for name, method in _FILES.items():
        if (folder / name).is_file() and read_json(folder / name):
            return method
    return None
