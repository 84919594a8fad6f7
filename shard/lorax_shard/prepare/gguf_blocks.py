"""The blocks of a GGUF file's matrices, in the order in which transformers has their rows.

A model that is converted from a GGUF file has its numbers in float32. Some rows change places on
the way (queries and keys, for rotary embeddings), so each row of the converted weight is looked for
among the file's dequantized rows: what is found is the same to the bit, and so is its block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.gguf_files import BLOCKS_FILE, blocks_folder
from lorax_shard.prepare.files import Progress, ProgressEvent, disk_errors, publish_folder
from lorax_shard.prepare.gguf import understood

if TYPE_CHECKING:
    import numpy as np
    import torch

logger = logging.getLogger(__name__)

# Types that hold a number as it is: there is nothing to keep.
_PLAIN = frozenset(("F32", "F16", "BF16", "F64"))


def keep_blocks(source: Path, folder: Path, cache_dir: Path, progress: Progress) -> None:
    """Keep the blocks of ``source``, from which ``folder`` was converted; made at most once.

    Raises StartupError (MODEL_UNSUPPORTED) for a type of block that no kernel computes with.
    """
    target = blocks_folder(folder)

    def on_wait() -> None:
        logger.info("another process reads the blocks of %s; waiting for it", source.name)

    with disk_errors(cache_dir), understood(source):
        publish_folder(
            target,
            lambda temporary: _write(source, folder, temporary / BLOCKS_FILE, progress),
            {"source": source.name},
            on_wait,
        )


def _write(source: Path, folder: Path, target: Path, progress: Progress) -> None:
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _tensor_names(reader)
    blocks: dict[str, torch.Tensor] = {}
    types: dict[str, str] = {}
    task = f"blocks of {source.name}"
    matrices = [name for name, _ in _matrices(folder)]
    for done, (name, weight) in enumerate(_matrices(folder)):
        progress(ProgressEvent(task, done, len(matrices), "weights"))
        tensor = tensors.get(f"{names.get_name(name.removesuffix('.weight'))}.weight")
        if tensor is None or tensor.tensor_type.name in _PLAIN:
            continue
        _check_type(source, tensor)
        rows = _matched(weight.numpy(), tensor)
        if rows is None:
            logger.warning("%s is not found in %s as it is, and stays float32", name, source.name)
            continue
        blocks[name.removesuffix(".weight")] = rows
        types[name.removesuffix(".weight")] = tensor.tensor_type.name
    progress(ProgressEvent(task, len(matrices), len(matrices), "weights"))
    if not blocks:
        raise StartupError(
            f"{source.name} holds no quantized weights; leave --quantize gguf out, or use "
            "--quantize int8.",
            ExitCode.MODEL_UNSUPPORTED,
        )
    save_file(blocks, target, metadata=types)


def _tensor_names(reader: Any) -> Any:
    """Return what maps transformers' names to those of the file."""
    import gguf

    architecture = str(reader.fields["general.architecture"].contents())
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    num_layers = int(reader.fields[f"{architecture}.block_count"].contents())
    return gguf.get_tensor_name_map(kind, num_layers)


def _matrices(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices of a converted model by name."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if name.endswith(".weight") and len(file.get_slice(name).get_shape()) == 2:
                    yield name, file.get_tensor(name)


def _check_type(source: Path, tensor: Any) -> None:
    from lorax_shard.linear.quantized.gguf_blocks import BLOCK_TYPES

    name = tensor.tensor_type.name
    if name not in BLOCK_TYPES:
        raise StartupError(
            f"{source.name} has blocks of type {name} ({tensor.name}), which no kernel computes "
            f"with: those of {', '.join(BLOCK_TYPES)} are. Use --quantize int8, which rounds the "
            "model's numbers anew, or leave --quantize out.",
            ExitCode.MODEL_UNSUPPORTED,
        )


def _matched(weight: np.ndarray, tensor: Any) -> torch.Tensor | None:
    """Return the tensor's rows of blocks in the order of the weight's rows; None if one is missing."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    numbers = dequantize(tensor.data, tensor.tensor_type)
    if numbers.shape[1:] != weight.shape[1:]:
        return None
    data = np.ascontiguousarray(tensor.data)
    if numbers.shape != weight.shape or not np.array_equal(numbers, weight):
        places = {row.tobytes(): place for place, row in enumerate(numbers)}
        order = [places.get(row.tobytes()) for row in weight]
        if None in order:
            return None
        data = data[np.array(order)]
    return torch.from_numpy(data.copy())
