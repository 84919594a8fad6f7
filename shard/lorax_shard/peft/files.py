"""The files of an adapter's folder, checked before anything of them is parsed as tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lorax_shard.adapter_files import (
    CONFIG_FILE,
    MLX_WEIGHTS_FILE,
    TEMPLATE_FILES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
)
from lorax_shard.peft.errors import AdapterRefusedError, listing, shorten

# What an adapter may bring of its own for turning text into tokens.
TEXT_FILES = tuple(sorted((*TOKENIZER_FILES, *TEMPLATE_FILES)))
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_MAX_NAME_LENGTH = 512
# What Git puts in the place of a large file that was not downloaded.
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """What an adapter may be at most; checked before it is parsed."""

    max_config_bytes: int = 1 << 20
    max_weights_bytes: int = 8 << 30
    # Two tensors for each linear of each expert: 94 layers of 128 experts have 73,000.
    max_header_bytes: int = 24 << 20
    max_tensors: int = 100_000
    max_rank: int = 512
    # Of each tokenizer or template file; of the two kinds that are read whole, less.
    max_text_bytes: int = 64 << 20
    max_tokenizer_bytes: int = 36 << 20
    max_template_bytes: int = 2 << 20

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header of its file announces it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextFile:
    """One tokenizer or template file."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """What an adapter brings for turning text into tokens."""

    files: tuple[TextFile, ...] = ()
    # One more than the highest token id of its tokenizer; 0: it brings none, or one that
    # cannot be counted without building it.
    num_tokens: int = 0

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template is a file of its own."""
        return any(file.name.startswith("chat_template.") for file in self.files)


def require_files(folder: Path, limits: AdapterLimits) -> Path:
    """Check that config and weights are there and of sizes worth reading; return the weights."""
    names = (WEIGHTS_FILE, MLX_WEIGHTS_FILE)
    weights = next((folder / name for name in names if (folder / name).is_file()), None)
    if weights is None:
        raise AdapterRefusedError(_without_weights(folder))
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterRefusedError(f"{CONFIG_FILE} is missing; an adapter is what PEFT saves")
    for path, limit in (
        (folder / CONFIG_FILE, limits.max_config_bytes),
        (weights, limits.max_weights_bytes),
    ):
        require_small(path, limit)
    return weights


def _without_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"its weights are in {listing(pickles)}: pickle files are never loaded, because "
            f"loading them can run code; save it as {WEIGHTS_FILE} (safe_serialization=True)"
        )
    if list(folder.glob(f"{WEIGHTS_FILE}.index.json")):
        return f"its weights are split into several files; save them as one {WEIGHTS_FILE}"
    return f"{WEIGHTS_FILE} is missing; an adapter is what PEFT saves"


def require_small(path: Path, limit: int) -> None:
    """Refuse a file that is too large, or only stands for one."""
    _require_size(path, limit)
    _refuse_pointer(path)


def _require_size(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise AdapterRefusedError(f"{path.name} has {size} bytes; the limit is {limit}")


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise AdapterRefusedError(
                f"{path.name} is a Git LFS pointer, which stands for the file; run `git lfs pull` "
                "in the adapter's folder to get the file itself"
            )


def read_header(path: Path, limits: AdapterLimits) -> dict[str, TensorInfo]:
    """Return the tensors that a safetensors file announces, every claim checked.

    Raises AdapterRefusedError. What it accepts fills the file exactly, so that no announced
    shape takes more memory than the file has bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, "it is cut off")
        if length > limits.max_header_bytes:
            raise AdapterRefusedError(
                f"{path.name} has a header of {length} bytes; "
                f"the limit is {limits.max_header_bytes}"
            )
        header = _parse_header(path, file.read(length))
    if len(header) > limits.max_tensors:
        raise AdapterRefusedError(
            f"{path.name} has {len(header)} tensors; the limit is {limits.max_tensors}"
        )
    found: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        found[name], span = _read_entry(path, name, entry)
        spans.append(span)
    _require_filled(path, spans, size - 8 - length)
    return found


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; two readers could take different ones of two equal names."""
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name occurs twice")
    return document


def _read_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if len(name) > _MAX_NAME_LENGTH:
        raise _damaged(path, f"the name {shorten(name)} is too long")
    if not isinstance(entry, dict):
        raise _damaged(path, f"the header describes {shorten(name)} in no known way")
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (_are_sizes(shape) and _are_sizes(span) and len(span) == 2):
        raise _damaged(path, f"the header describes {shorten(name)} in no known way")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise AdapterRefusedError(
            f"tensor {shorten(name)} has the type {shorten(dtype)}; "
            "adapters are read in float32, float16 and bfloat16"
        )
    begin, end = span
    # In this order: a product of foreign numbers can have very many digits.
    if len(shape) > 4 or math.prod(shape) * _DTYPE_BYTES[dtype] != end - begin:
        raise _damaged(path, f"the size of {shorten(name)} does not fit its shape")
    return TensorInfo(dtype, tuple(shape)), (begin, end)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 62 for value in values
    )


def _require_filled(path: Path, spans: list[tuple[int, int]], size: int) -> None:
    position = 0
    for begin, end in sorted(spans):
        if begin != position or end < begin:
            raise _damaged(path, "its tensors overlap or leave gaps")
        position = end
    if position != size:
        raise _damaged(path, "its tensors do not end where the file ends")


def _damaged(path: Path, why: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"{path.name} is damaged: {why}")


def find_text_files(folder: Path, limits: AdapterLimits) -> TextFiles:
    """Return the tokenizer and template files of an adapter; raises AdapterRefusedError."""
    files = []
    for name in TEXT_FILES:
        path = folder / name
        if path.is_file():
            require_small(path, _text_limit(name, limits))
            files.append(TextFile(name, path.stat().st_size, sha256_of(path)))
    return TextFiles(files=tuple(files), num_tokens=_count_tokens(folder))


def _text_limit(name: str, limits: AdapterLimits) -> int:
    if name == TOKENIZER_FILE:
        return min(limits.max_text_bytes, limits.max_tokenizer_bytes)
    if name in (*TEMPLATE_FILES, TOKENIZER_CONFIG_FILE):
        return min(limits.max_text_bytes, limits.max_template_bytes)
    return limits.max_text_bytes


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _count_tokens(folder: Path) -> int:
    """Return one more than the highest id in tokenizer.json."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return 0
    try:
        document = json.loads(path.read_bytes())
        vocabulary = document["model"]["vocab"]
        # Most kinds map tokens to ids; unigram models list tokens in the order of their ids.
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        ids += [token["id"] for token in _list(document.get("added_tokens"))]
        if not all(type(each) is int for each in ids):
            raise ValueError("an id is no whole number")
        return int(max(ids, default=-1)) + 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterRefusedError("tokenizer.json is damaged: it is no tokenizer") from error


def _list(value: Any) -> list[Mapping[str, Any]]:
    return value if isinstance(value, list) else []
