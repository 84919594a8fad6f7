"""The table of how checkpoints are quantized: each method read here, or refused by name.

What a checkpoint says of itself is recognized before anything of it is loaded: its codes would be
garbage as weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lorax_shard.codes.formats.awq import read_awq, refuse_awq
from lorax_shard.codes.formats.bitsandbytes import read_bitsandbytes
from lorax_shard.codes.formats.compressed import read_compressed, refuse_compressed
from lorax_shard.codes.formats.gptq import read_gptq, refuse_gptq
from lorax_shard.codes.formats.mlx import read_mlx, refuse_mlx
from lorax_shard.codes.formats.mxfp4 import read_mxfp4
from lorax_shard.codes.formats.scaled import read_fp8, read_modelopt, refuse_modelopt
from lorax_shard.codes.tensors import CodedTensor, Files
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
_OWN_ORDER = "its codes lie in the order of kernels for CUDA"
_OWN_CODES = "its codes need a package that is not used here"

Read = Callable[[Files, Mapping[str, Any]], dict[str, CodedTensor]]
Refuse = Callable[[Mapping[str, Any]], str | None]


def _takes_all(_options: Mapping[str, Any]) -> str | None:
    return None


class Method(NamedTuple):
    """One way to quantize a checkpoint: what reads it, or why it is refused."""

    name: str
    # Returns the coded weights by their names in the model.
    read: Read | None
    # Returns why options of a configuration are refused.
    refuse: Refuse


def _read(name: str, read: Read, refuse: Refuse = _takes_all) -> Method:
    return Method(name, read, refuse)


def _refused(name: str, reason: str) -> Method:
    return Method(name, None, lambda _options: reason)


METHODS: dict[str, Method] = {
    "awq": _read("AWQ", read_awq, refuse_awq),
    "bitsandbytes": _read("bitsandbytes", read_bitsandbytes),
    "bitsandbytes_4bit": _read("bitsandbytes", read_bitsandbytes),
    "bitsandbytes_8bit": _read("bitsandbytes", read_bitsandbytes),
    "compressed-tensors": _read("compressed-tensors", read_compressed, refuse_compressed),
    "fbgemm_fp8": _read("FP8", read_fp8),
    "fp8": _read("FP8", read_fp8),
    "gptq": _read("GPTQ", read_gptq, refuse_gptq),
    "mlx": _read("MLX", read_mlx, refuse_mlx),
    "modelopt": _read("ModelOpt", read_modelopt, refuse_modelopt),
    "mxfp4": _read("MXFP4", read_mxfp4),
    "aqlm": _refused("AQLM", _OWN_CODES),
    "auto-round": _refused(
        "AutoRound", "it is read where it was saved as gptq, awq or compressed-tensors"
    ),
    "bitnet": _refused("BitNet", _OWN_CODES),
    "eetq": _refused("EETQ", _OWN_ORDER),
    "exl2": _refused("EXL2", _OWN_ORDER),
    "exl3": _refused("EXL3", _OWN_ORDER),
    "higgs": _refused("HIGGS", _OWN_CODES),
    "hqq": _refused("HQQ", _OWN_CODES),
    "quanto": _refused("Quanto", _OWN_CODES),
    "quip": _refused("QuIP", _OWN_CODES),
    "spqr": _refused("SpQR", _OWN_CODES),
    "torchao": _refused("torchao", _OWN_CODES),
    "vptq": _refused("VPTQ", _OWN_CODES),
}


class Found(NamedTuple):
    """How a checkpoint says that it is quantized."""

    method: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The method's name as people write it."""
        known = METHODS.get(self.method)
        return known.name if known else self.method


def find_method(folder: Path, document: Mapping[str, Any]) -> Found | None:
    """Return by what a checkpoint is quantized, None if nothing says so."""
    nested = [document.get(name) for name in _NESTED]
    for each in (document, *nested):
        if not isinstance(each, Mapping):
            continue
        for key in _KEYS:
            found = each.get(key)
            if isinstance(found, Mapping) and found:
                fallback = "mlx" if key == "quantization" else "an unnamed method"
                return Found(str(found.get("quant_method") or fallback).lower(), found)
    for name, method in _FILES.items():
        if (folder / name).is_file() and (options := read_json(folder / name)):
            return Found(method, options)
    return None


def refuse_quantized(folder: Path, document: Mapping[str, Any]) -> str | None:
    """Return why a checkpoint cannot be served because of how it is quantized, or None."""
    found = find_method(folder, document)
    if found is None:
        return None
    known = METHODS.get(found.method)
    reason = known.refuse(found.options) if known else "this method is not known here"
    return f"it is quantized ({found.name}): {reason}; {_INSTEAD}" if reason else None


def refuse_codes(files: Iterable[Path], known: Iterable[str] = ()) -> str | None:
    """Return why weights cannot be served that hold codes although no configuration says so.

    ``known``: tensors whose codes are read.
    """
    known = frozenset(known)
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in set(file.keys()) - known:
                    dtype = file.get_slice(name).get_dtype()
                    if name.endswith("weight") and dtype not in _PLAIN:
                        return f"{name} is stored as {dtype}, so it is quantized; {_INSTEAD}"
        except (SafetensorError, OSError, ValueError):
            # Damage has its own words elsewhere.
            return None
    return None
