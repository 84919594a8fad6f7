"""The tensors of a model folder, whatever they are stored as: numbers, read by part."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.codes.methods import METHODS, find_method
from lorax_shard.codes.tensors import CodedFile, CodedTensor, CodesError
from lorax_shard.files import read_json
from lorax_shard.model.damage import refuse_corrupt
from lorax_shard.parallel.slices import open_files

logger = logging.getLogger(__name__)

# What quantized checkpoints have beside weights and codes: of activations, and of K and V.
_NOT_NEEDED = (
    ".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".kv_scale",
    ".input_zero_point", ".input_scale_ub", ".input_global_scale",
)  # fmt: skip


class CodedWeights(NamedTuple):
    """The tensors of a quantized checkpoint that are codes, by the model's names for them."""

    tensors: Mapping[str, CodedTensor]
    # All tensors of the files that are no weights of the model themselves.
    keys: frozenset[str]

    @property
    def num_elements(self) -> int:
        """How many numbers they stand for."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


NONE_CODED = CodedWeights({}, frozenset())


def find_codes(folder: Path) -> CodedWeights:
    """Return what of a folder's weights is codes; none where it is not quantized.

    Nothing is decoded yet. Raises StartupError: MODEL_CORRUPT for files that are damaged,
    MODEL_UNSUPPORTED for codes that do not fit together.
    """
    found = find_method(folder, read_json(folder / "config.json") or {})
    read = METHODS[found.method].read if found and found.method in METHODS else None
    if found is None or read is None:
        return NONE_CODED
    try:
        files = open_files(folder)
        tensors = read(files, found.options)
    except CodesError as error:
        raise StartupError(
            f"{folder} cannot be served: it is quantized ({found.name}), and {error}; fetch the "
            "model again, or serve the one that it was made from",
            ExitCode.MODEL_UNSUPPORTED,
        ) from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        refuse_corrupt(folder, error)
    keys = {key for tensor in tensors.values() for key in tensor.keys}
    keys |= {key for key in files if key.endswith(_NOT_NEEDED)}
    logger.info(
        "%d matrices are stored as codes (%s), and are decoded while they are read",
        len(tensors),
        found.name,
        extra={"fields": {"event": "coded", "method": found.method, "matrices": len(tensors)}},
    )
    return CodedWeights(tensors, frozenset(keys))


def open_weights(folder: Path, coded: CodedWeights) -> Mapping[str, Any]:
    """Return the open file of each tensor; those of coded ones give numbers in float32."""
    files = open_files(folder)
    plain = {key: file for key, file in files.items() if key not in coded.keys}
    return {**plain, **dict.fromkeys(coded.tensors, CodedFile(coded.tensors))}
