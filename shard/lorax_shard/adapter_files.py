"""The files of an adapter: what they are called, and what names a set of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

CONFIG_FILE = "adapter_config.json"
# What transformers says of a model: of an adapter the names of its labels.
LABELS_FILE = "config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# As mlx-lm calls it.
MLX_WEIGHTS_FILE = "adapters.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model",
    TOKENIZER_FILE, "tokenizer.model", TOKENIZER_CONFIG_FILE, "vocab.json", "vocab.txt",
)  # fmt: skip
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file that lies in a folder, whole."""

    name: str
    size: int
    sha256: str


def files_digest(files: Iterable[StoredFile]) -> str:
    """Return the digest that names a set of files: names, sizes and contents."""
    listing = sorted((file.name, file.size, file.sha256) for file in files)
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
