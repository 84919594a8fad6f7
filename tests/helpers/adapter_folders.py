"""Small folders that look like adapters to sources and the store."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def safetensors(seed: int = 0, num_floats: int = 64) -> bytes:
    """Return a safetensors file with one tensor."""
    entry = {"dtype": "F32", "shape": [num_floats], "data_offsets": [0, 4 * num_floats]}
    header = json.dumps({"x": entry}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(4 * num_floats)


def adapter_files(seed: int = 0, num_floats: int = 64) -> dict[str, bytes]:
    """Return the files of an adapter with its own tokenizer, and some that nobody wants."""
    return {
        CONFIG: json.dumps({"peft_type": "LORA", "r": 8, "seed": seed}).encode(),
        WEIGHTS: safetensors(seed, num_floats),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"# read me",
        "optimizer.pt": b"pickle",
    }


WANTED = {CONFIG, WEIGHTS, "tokenizer.json", "chat_template.jinja"}


def write_adapter(folder: Path, seed: int = 0, num_floats: int = 64) -> Path:
    """Write an adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in adapter_files(seed, num_floats).items():
        (folder / name).write_bytes(data)
    return folder


def tree(root: Path) -> set[str]:
    """Return the relative names of all files and folders below ``root``."""
    return {str(path.relative_to(root)) for path in root.rglob("*")}
