"""Checks a model folder before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.codes.methods import refuse_codes
from lorax_shard.device_memory import free_bytes
from lorax_shard.model.damage import refuse_corrupt
from lorax_shard.model.stored import NONE_CODED, CodedWeights

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder; pickled weights are refused.

    Raises StartupError when there are none, or when the index names a missing one.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise StartupError(
            f"{folder} holds pickled weights only ({pickled[0]}), which can run code when they are "
            "loaded; convert them to safetensors",
            ExitCode.MODEL_UNSUPPORTED,
        )
    raise StartupError(
        f"{folder} holds no weights: expected {_SINGLE} or {_INDEX}", ExitCode.MODEL_NOT_FOUND
    )


def check_weights(
    files: list[Path],
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_parts: int = 1,
    parts_here: int = 1,
    coded: CodedWeights = NONE_CODED,
) -> None:
    """Read the header of every file; a damaged one, or too little memory, is a StartupError.

    ``num_parts``: over how many ranks the weights are spread, about evenly; ``parts_here``: how
    many of them share this device's memory, and read at the same time; ``coded``: what of the
    weights is decoded while it is read.
    """
    elements = sum(_count_elements(path, coded.keys) for path in files) + coded.num_elements
    elements = elements * parts_here // num_parts
    if quantized := refuse_codes(files, coded.keys):
        raise StartupError(
            f"{files[0].parent} cannot be served: {quantized}", ExitCode.MODEL_UNSUPPORTED
        )
    needed = elements * dtype.itemsize
    free = free_bytes(device)
    if needed > free:
        raise StartupError(
            f"the weights take {needed / 1e9:.2f} GB as {_name(dtype)} and {free / 1e9:.2f} GB of "
            f"{device.type} memory are free; choose a smaller model or a smaller dtype",
            ExitCode.OUT_OF_MEMORY,
        )


def _indexed_files(folder: Path) -> list[Path]:
    try:
        names = set(
            json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartupError(
            f"{folder / _INDEX} is not a safetensors index ({error}); fetch the model again",
            ExitCode.MODEL_CORRUPT,
        ) from error
    files = [folder / name for name in sorted(names)]
    if missing := [path.name for path in files if not path.is_file()]:
        raise StartupError(
            f"{folder} lacks {', '.join(missing)}, which its index names; fetch the model again",
            ExitCode.MODEL_CORRUPT,
        )
    return files


def _count_elements(path: Path, apart: frozenset[str]) -> int:
    """Return how many numbers a file holds, some tensors set ``apart``; opening it checks its header against its length."""
    total = 0
    try:
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) - apart:
                size = 1
                for extent in file.get_slice(name).get_shape():
                    size *= extent
                total += size
    except (SafetensorError, OSError, ValueError) as error:
        refuse_corrupt(path, error)
    return total


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
