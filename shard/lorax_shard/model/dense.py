"""Linears behind the pooling: what sentence-transformers' ``Dense`` steps make of a vector.

Each has a folder of its own: ``config.json`` with its widths and its activation, and the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.model.damage import refuse_corrupt
from lorax_shard.model.step_files import corrupt, document_of, unsupported
from lorax_shard.model.vector_facts import dense_folders

Activation = Callable[[torch.Tensor], torch.Tensor]

_ACTIVATIONS: dict[str, Activation] = {
    "Identity": lambda values: values,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "ReLU": functional.relu,
    "GELU": functional.gelu,
    "SiLU": functional.silu,
}
# Without a word about it.
_USUAL = "torch.nn.modules.activation.Tanh"
_WEIGHTS = "model.safetensors"
# Later releases name what a step reads and writes.
_SENTENCE = "sentence_embedding"


@dataclass(frozen=True, slots=True)
class Dense:
    """One linear with its activation."""

    weight: torch.Tensor  # out x in
    bias: torch.Tensor | None  # out
    activation: Activation

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> Self:
        """Read a step in float32; raises StartupError."""
        document = document_of(folder / "config.json")
        tensors = _tensors(folder, device)
        weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
        widths = tuple(document.get(each) for each in ("out_features", "in_features"))
        if weight is None or tuple(weight.shape) != widths:
            raise corrupt(
                folder / _WEIGHTS, "linear.weight has not the widths that config.json says"
            )
        if (bias is None) == bool(document.get("bias", True)):
            raise corrupt(folder / _WEIGHTS, "it has not the bias that config.json says")
        return cls(weight, bias, _activation(folder, document))

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """Return what it makes of a vector."""
        return self.activation(functional.linear(vector, self.weight, self.bias))


class Projection:
    """What a model's steps behind its pooling make of vectors, one after the other."""

    def __init__(self, steps: Sequence[Dense]) -> None:
        self._steps = steps

    @classmethod
    def of(cls, folder: Path, device: torch.device) -> Self | None:
        """Read that of a model's folder; None: it has no such step. Raises StartupError."""
        steps = [Dense.read(each, device) for each in dense_folders(folder)]
        return cls(steps) if steps else None

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the vector that clients get, in float32."""
        with torch.inference_mode():
            for step in self._steps:
                vector = step(vector)
        return vector


def check_dense(folder: Path, hidden_size: int) -> None:
    """Raise StartupError for steps that do not fit a model or each other, or that are not computed."""
    width = hidden_size
    for each in dense_folders(folder):
        document = document_of(each / "config.json")
        if document.get("in_features") != width:
            raise corrupt(
                each / "config.json", f"it takes {document.get('in_features')} numbers of {width}"
            )
        _activation(each, document)
        named = {document.get(f"module_{way}put_name") for way in ("in", "out")}
        if not named <= {None, _SENTENCE}:
            raise unsupported(each, "config.json reads or writes other values than a text's vector")
        width = document.get("out_features") or 0


def _activation(folder: Path, document: Mapping[str, Any]) -> Activation:
    named = str(document.get("activation_function") or _USUAL)
    own, _, name = named.rpartition(".")
    if not own.startswith("torch.nn.") or name not in _ACTIVATIONS:
        raise unsupported(folder, f"config.json names the activation {named!r}")
    return _ACTIVATIONS[name]


def _tensors(folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    path = folder / _WEIGHTS
    if not path.is_file():
        raise StartupError(
            f"{path} does not exist; weights in other formats are not loaded: save the model with "
            "safe_serialization=True",
            ExitCode.MODEL_UNSUPPORTED,
        )
    try:
        read = load_file(path, device=str(device))
    except SafetensorError as error:
        refuse_corrupt(path, error)
    return {name: tensor.float() for name, tensor in read.items()}
